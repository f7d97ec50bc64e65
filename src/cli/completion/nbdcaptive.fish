# Completes command lines of nbdcaptive in fish. Try it: nbdcaptive --completion fish | source

function __nbdcaptive_candidates
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l program $words[1]
    command -q -- $program; or set program nbdcaptive
    for line in (command $program --candidates $words[2..-1] "$current" 2>/dev/null)
        if not string match -q -- ' *' $line
            echo -- $line
            continue
        end
        # Names that fish knows, behind what stands before them in this word.
        set -l order (string split -m 2 ' ' -- $line)
        set -l before $order[3]
        set -l typed (string sub -s (math (string length -- "$before") + 1) -- "$current")
        switch $order[2]
            case files
                __fish_complete_path "$typed"
            case directories
                __fish_complete_directories "$typed" ''
            case users
                __fish_complete_users
            case groups
                __fish_complete_groups
        end | string replace -r '^' -- (string escape --style=regex -- "$before" | string replace -a '$' '$$')
    end
end

complete -c nbdcaptive -f -k -a '(__nbdcaptive_candidates)'
# Where it goes by nbdkit's name, by that too.
if command -q nbdkit; and test (path resolve (command -s nbdkit)) = (path resolve (command -s nbdcaptive; or echo /no/such))
    complete -c nbdkit -f -k -a '(__nbdcaptive_candidates)'
end
