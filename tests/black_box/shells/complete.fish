# Prints what fish offers for each argument, and a line END.
nbdcaptive --completion fish | source
for line in $argv
    complete -C "$line" | string replace -r '\t.*' ''
    echo END
end
