# Completes command lines of nbdcaptive in bash. Try it: source <(nbdcaptive --completion bash)

_nbdcaptive() {
    COMPREPLY=()
    # bash has split words at = and : too. They are put together again where the line has no space between them; `left` is
    # what bash keeps of the current word, so that replies go without it.
    local words=() word= left= piece= rest=${COMP_LINE-} index
    for ((index = 0; index <= COMP_CWORD; index++)); do
        piece=${COMP_WORDS[index]-}
        if [[ -n ${COMP_LINE-} ]]; then
            [[ $index -eq 0 || $rest == [[:space:]]* ]] && left= || left=$word
            rest=${rest#"${rest%%[![:space:]]*}"}
            rest=${rest#"$piece"}
        else
            [[ $index -gt 1 && ($piece == [=:]* || $word == *[=:]) ]] && left=$word || left=
        fi
        if [[ -n $left ]]; then
            word+=$piece
            words[${#words[@]} - 1]=$word
        else
            word=$piece
            words+=("$word")
        fi
    done
    [[ $piece == [=:] ]] && left=$word

    local program=${words[0]/#"~/"/"$HOME/"} candidate order=
    type -P "$program" >/dev/null || program=nbdcaptive
    while IFS=$'\t' read -r candidate _; do
        case $candidate in
            ' '*) order=${candidate# } ;;
            *) COMPREPLY+=("${candidate#"$left"}") ;;
        esac
    done < <("$program" --candidates "${words[@]:1}" 2>/dev/null)

    if [[ -n $order ]]; then
        # What stands before the path in this word.
        local before=${order#* } path= found= beside=${#COMPREPLY[@]} action=
        path=${word#"$before"}
        case $order in
            files*) action=file ;;
            directories*) action=directory ;;
            users*) action=user ;;
            groups*) action=group ;;
        esac
        if [[ $action == [fd]i* && $path == *[\"\'\\]* ]]; then
            # Of quotes readline knows more.
            compopt -o default 2>/dev/null
        else
            while IFS= read -r found; do
                if [[ $action == [fd]i* && $beside -gt 0 ]]; then
                    # Among words that are no files each file brings its own quotes and slash.
                    [[ -d $found ]] && found+=/
                    printf -v found %q "$found"
                fi
                found=$before$found
                COMPREPLY+=("${found#"$left"}")
            done < <(compgen -A "$action" -- "$path")
            [[ $action == [fd]i* && $beside -eq 0 ]] && compopt -o filenames 2>/dev/null
        fi
    fi
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=:/] ]] && compopt -o nospace 2>/dev/null
    return 0
}

complete -F _nbdcaptive nbdcaptive
# Where it goes by nbdkit's name, by that too.
if [[ $(type -P nbdkit) -ef $(type -P nbdcaptive) ]]; then
    complete -F _nbdcaptive nbdkit
fi
