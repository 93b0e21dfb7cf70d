"""Three steps of every recipe, as numbers to hold on to: a change that is meant to change nothing is held to them.

    python tests/pins.py --write            # after a change that is meant to change digits
    python tests/pins.py --add              # only the cases that are not pinned yet
    python tests/pins.py --exact            # compare bit for bit (on the machine that wrote them, one thread)

For each case tests/data/pins.json keeps every step's loss, gradient norm and lengths, and a hash of all sampled ids.
"""
import contextlib
import hashlib
import io
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import rollout  # noqa: E402
import train  # noqa: E402
from extras import fast, teachers  # noqa: E402
from support import responses as given  # noqa: E402

FILE = ROOT / "tests/data/pins.json"
KEYS = ("loss", "grad_norm", "mean_length", "reverse_kl", "reward", "kept", "advantage")
SETTINGS = "--problems 6 --steps 3 --eval_limit 1 --eval_k 1 --max_new_tokens 32 --eval_every 0 --no-eval_teacher " \
           "--threads 1 --device cpu --no-token_view"
CASES = {name: f"--recipe {name}" for name in train.SETTINGS.recipes} | {
    "lora": "--recipe opd --lora_rank 4", "sg_lora": "--recipe sg --lora_rank 4",
    "cold_start": "--recipe opd --cold_start_steps 2", "sft_teacher": "--recipe sft --responses teacher",
    "gkd_samples": "--recipe gkd --samples 2 --lmbda 0.3", "live": "--recipe opsd --self_teacher live --updates 2",
    "mix": f"--recipe opd --mix_data {ROOT}/toy/mixed_train.jsonl --mix 0.3",
    "xtok_jsd": "--recipe xtok --divergence jsd", "xtok_fire": "--recipe xtok --weight fire",
    "xtok_prefix": "--recipe xtok --chunk_credit prefix", "xtok_exopd": "--recipe xtok --advantage exopd",
    "gold": "--recipe xtok --divergence gold", "uld": "--recipe xtok --divergence uld",
    "updates": "--recipe fire --updates 3", "align_always": "--recipe opd --align always --divergence policy_gradient",
    "temperature": "--recipe topk --temperature 0.7", "bfloat16": "--recipe opd --dtype bfloat16",
}


def run_case(flags: str, runs: str) -> dict:
    """{"ids": hash of all sampled ids, "steps": [{key: number}]}"""
    found, assemble = hashlib.sha256(), rollout.assemble

    def noting(prompts, responses, *rest):
        found.update(repr([[int(i) for i in response] for response in responses]).encode())
        return assemble(prompts, responses, *rest)
    # given responses and other prompts hold the function by names of their own
    rollout.assemble = given.assemble = teachers.assemble = noting
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
            status = train.main([*SETTINGS.split(), *flags.split(), "--runs", runs, "--name", "pin", "--fresh"])
    finally:
        rollout.assemble = given.assemble = teachers.assemble = assemble
    assert status == 0, out.getvalue()
    records = map(json.loads, (Path(runs) / "pin/metrics.jsonl").read_text().splitlines())
    return {"ids": found.hexdigest()[:16],
            "steps": [{key: record.get(key) for key in KEYS} for record in records if "loss" in record]}


def main() -> int:
    fast.prove = lambda run, folder, state: None        # what the proof at start samples is not of the run
    before = json.loads(FILE.read_text()) if "--add" in sys.argv else {}
    with tempfile.TemporaryDirectory() as runs:
        found = {name: before.get(name) or run_case(flags, runs) for name, flags in CASES.items()}
    if {"--write", "--add"} & set(sys.argv):
        FILE.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()) + "\n}\n")
        return 0
    pinned = json.loads(FILE.read_text())
    different = [name for name in pinned if found.get(name) != pinned[name]]
    print(f"{len(pinned)} cases, {len(different)} not bit for bit as pinned: {' '.join(different)}")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
