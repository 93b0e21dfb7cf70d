#!/usr/bin/env bash
# Speedrun: Qwen3-0.6B learns from Qwen3-4B on GSM8K, on one GPU, in one command.
#
#     bash speedrun.sh                    # download, plan, check, train, evaluate, report
#     bash speedrun.sh --price 2.50       # and what it has cost, at dollars per hour
#     bash speedrun.sh --dry              # all of it on a CPU in a minute: random weights of small shape, real files
#     bash speedrun.sh -- --steps 50      # what follows -- goes to train.py
#
# Stopped and started again, it goes on where it was. It writes to runs/ (or --runs FOLDER): the run, and beside it a
# folder of results. What to expect: docs/speedrun.md.
set -euo pipefail

fail() { echo "error: $1" >&2; exit 2; }

dry="" price="" runs="" name=speedrun
while [ $# -gt 0 ]; do
    case $1 in
        --dry) dry=yes name=speedrun-dry ;;
        --price) price=${2-}; shift
            [[ $price =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "--price takes dollars per hour, as in --price 2.50" ;;
        --runs) runs=${2-}; shift
            [ -n "$runs" ] || fail "--runs takes a folder, as in --runs /data/runs" ;;
        -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit ;;
        --) shift; break ;;
        *) fail "unknown flag $1; there are --dry, --price DOLLARS_PER_HOUR, --runs FOLDER, and -- before train.py's" ;;
    esac
    shift
done
more=("$@")
[ -z "$runs" ] || [[ $runs == /* ]] || runs=$PWD/$runs
cd "$(dirname "${BASH_SOURCE[0]}")"
runs=${runs:-runs} results=${runs:-runs}/$name-results
mkdir -p "$results" 2>/dev/null || fail "--runs $runs: no folder can be made there"

# Seconds of every phase, of all starts together: a line each, also of the phase in which a start is stopped.
phase="" since=$SECONDS
note() { [ -z "$phase" ] || echo "$phase $((SECONDS - since))" >>"$results/seconds.txt"; phase=""; }
trap note EXIT
begin() { note; phase=$1 since=$SECONDS; echo; echo "== $1"; }

begin requirements
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3) || fail "python3 is not installed"
"$python" -c "import sys; sys.exit(sys.version_info < (3, 10))" || fail "Python 3.10 or newer is needed"
if ! "$python" -c "import torch, safetensors, tokenizers, numpy, jinja2, huggingface_hub, tqdm" 2>/dev/null; then
    "$python" -m venv .venv || fail "no virtual environment can be made here; on Debian, apt install python3-venv"
    python=.venv/bin/python
    "$python" -m pip install -q -r requirements.txt || fail "requirements.txt could not be installed into .venv"
fi
[ -n "$dry" ] || "$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())" \
    || fail "torch finds no GPU here; bash speedrun.sh --dry goes through all of it on a CPU"
device=$("$python" -c "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU')")
echo "$python on $device"

begin download
if [ -n "$dry" ]; then
    data=$results student=$results/student teacher=$results/teacher
    "$python" toy/dry_pair.py "$results"
    size=(--max_new_tokens 24 --device cpu)
    small=("${size[@]}" --steps 4 --problems 4 --eval_every 2 --save_every 1)
else
    data=gsm8k student=Qwen/Qwen3-0.6B teacher=Qwen/Qwen3-4B size=(--max_new_tokens 512) small=()
    from=https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data
    mkdir -p gsm8k
    for f in train test; do
        [ -s gsm8k/$f.jsonl ] && continue
        curl -fsSL --retry 3 -o gsm8k/$f.part $from/$f.jsonl \
            || fail "GSM8K could not be downloaded; put train.jsonl and test.jsonl into gsm8k/ and start again"
        mv gsm8k/$f.part gsm8k/$f.jsonl
    done
fi
"$python" - "$student" "$teacher" <<'END'
import sys
from support.errors import UserError
from support.weights import checkpoint_folder
try:
    print("models", *(checkpoint_folder(name) for name in sys.argv[1:]), sep="\n")
except UserError as error:
    sys.exit(f"error: {error}")
END

# the README's command; of a flag that is given twice the later one counts
train=(train.py --student "$student" --teacher "$teacher" --data "$data/train.jsonl" --eval_data "$data/test.jsonl"
    --template_vars enable_thinking=false --max_new_tokens 512 --lr 2e-6 --steps 200 --eval_limit 200 --eval_k 1
    --gradient_checkpointing ${small[@]+"${small[@]}"} ${more[@]+"${more[@]}"} --runs "$runs" --name "$name")
begin plan
"$python" "${train[@]}" --plan || {
    [ $? -ne 1 ] || fail "the plan does not fit this GPU; put the flags that it advises behind --, and start again"
    exit 2
}

begin train                     # the check is its first act: loss and gradient are 0 where a model is its own teacher
"$python" "${train[@]}" --self_check

begin evaluate                  # all held-out problems, greedy, the untouched student and the trained one alike
for when in before after; do
    [ "$results/$when.json" -nt "$runs/$name/summary.json" ] && continue
    model=$([ $when = before ] && echo "$student" || echo "$runs/$name/last")
    "$python" eval.py --model "$model" --data "$data/test.jsonl" --k 1 --temperature 0 "${size[@]}" \
        --template_vars enable_thinking=false --out "$results/$when.jsonl" >"$results/$when.part"
    mv "$results/$when.part" "$results/$when.json"
done

note
echo
"$python" - "$runs/$name" "$results" "$price" "$device" <<'END'
import json, sys
from collections import Counter
from pathlib import Path
run, results, price, device = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
before, after = (json.loads((results / f"{when}.json").read_text()) for when in ("before", "after"))
seconds = Counter()
for line in (results / "seconds.txt").read_text().splitlines():
    phase, taken = line.split()
    seconds[phase] += int(taken)
# a kill leaves no line of the phase that it ends, but the run knows how long its steps took
seconds["train"] = max(seconds["train"], round(json.loads((run / "summary.json").read_text())["seconds"]))
whole = sum(seconds.values())
cost = f"${whole / 3600 * float(price):.2f}" if price else ""
cells = [device, f"{before['problems']:,}", f"{before['avg@1']:.1%}", f"{after['avg@1']:.1%}",
         *(f"{seconds[phase]:,} s" for phase in ("download", "train", "evaluate")), f"{whole:,} s", cost or "-"]
text = (f"done    {before['problems']:,} held-out problems, greedy: {before['avg@1']:.1%} -> {after['avg@1']:.1%}\n"
        f"        {whole:,} seconds: " + ", ".join(f"{phase} {taken:,}" for phase, taken in seconds.items())
        + (f"; cost {cost} at ${price} an hour" if price else "") + f"\n        look at {run}/report.html\n\n"
        f"the row for docs/speedrun.md:\n| {' | '.join(cells)} |\n")
(results / "report.part").write_text(text)
(results / "report.part").rename(results / "report.txt")
print(text, end="")
END
