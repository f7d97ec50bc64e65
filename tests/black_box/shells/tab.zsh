# Types each argument into an interactive shell, presses Tab, and writes to the file $ANSWERS: the line as it then is, the
# words that were offered, and a line END.
emulate -R zsh
zmodload zsh/zpty
shell=$1
shift
case $shell in
    zsh)
        zpty inner zsh -f -i
        setup=(
            'PROMPT=; unset zle_bracketed_paste; setopt no_auto_list no_auto_menu no_beep; LISTMAX=1000000; stty -echo'
            'autoload -Uz compinit; compinit -u -D; source <(nbdcaptive --completion zsh)'
            # What is offered goes through compadd; where it is asked for a list it answers that and offers nothing.
            'compadd() { local -a hits; if [[ ${@[1,(i)(-|--)]} != *-(O|A|D)\ * ]]; then builtin compadd -A hits "$@"; seen+=("$IPREFIX"${^hits}); fi; builtin compadd "$@"; }'
            'answer() { print -rl -- "$BUFFER" $seen END >>$ANSWERS; print -r -- "<<""END>>"; seen=(); BUFFER=; }'
            'zle -N answer; bindkey "^T" answer; bindkey "^I" complete-word'
        )
        ;;
    bash)
        zpty inner bash --norc --noprofile -i
        setup=(
            'PS1=; bind "set enable-bracketed-paste off"; bind "set bell-style none"; stty -echo'
            'source <(nbdcaptive --completion bash)'
            'offer() { _nbdcaptive "$@"; seen=("${COMPREPLY[@]}"); }; complete -F offer nbdcaptive'
            'answer() { printf "%s\n" "$READLINE_LINE" "${seen[@]}" END >>$ANSWERS; echo "<<""END>>"; seen=(); READLINE_LINE=; READLINE_POINT=0; }'
            'bind -x "\"\C-t\": answer"'
        )
        ;;
esac
for line in $setup 'echo "<<""READY>>"'; do
    zpty -w inner $line
done
zpty -r inner seen '*<<READY>>*'
for line; do
    zpty -w -n inner $line$'\t\C-t'
    zpty -r inner seen '*<<END>>*'
done
zpty -d inner
