"""Who should train the experts' matrices of mla_moe.py: Muon, or AdamW beside it?

    python experiments/muon_for_experts.py          # a few minutes on a CPU
    python experiments/muon_for_experts.py --steps 20 --input_file data/sample.txt

Trains a small model of characters in three ways, each at several learning rates, with the same batches and the same
initial weights. Prints a Markdown table of the loss on held-out text.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import mla_moe  # noqa: E402
import train  # noqa: E402
from support import cli  # noqa: E402

SMALL = "--arch mla_moe --tokenizer char --n_layer 2 --n_head 4 --n_embd 64 --expert_width 64 --block_size 64"
SMALL += " --seq_len 64 --batch_size 8 --balance_rate 1e-2 --val_fraction 0.1 --eval_batches 60 --target_loss 0"
SMALL += " --weight_decay 0 --randomize_batches --num_prompts 0 --recall_places 0 --no_mfu --log_every 1000"
SMALL += " --save_every 1000 --eval_every 1000"
RATES = (3e-3, 1e-2)

groups_by_muon = mla_moe.MLAMoE.parameter_groups


def groups_with_experts_by_adamw(model) -> dict:
    """Muon takes `matrices` alone, and AdamW the other groups."""
    groups = groups_by_muon(model)
    experts = [p for p in groups["matrices"] if p.dim() == 3]
    matrices = [p for p in groups["matrices"] if p.dim() == 2]
    return {**groups, "matrices": matrices, "embeddings": groups["embeddings"] + experts}


WAYS = {
    "Muon": ("muon", groups_by_muon),
    "Muon, experts by AdamW": ("muon", groups_with_experts_by_adamw),
    "AdamW": ("adamw", groups_by_muon),
}


def val_loss(optimizer: str, groups, lr: float, flags: Sequence[str]) -> float:
    mla_moe.MLAMoE.parameter_groups = groups
    with tempfile.TemporaryDirectory() as folder:
        words = [*SMALL.split(), *flags, "--optimizer", optimizer, "--lr", str(lr), "--out_dir", folder]
        # what AdamW trains beside Muon keeps a rate of its own, and so do experts there
        words += ["--embed_lr", "3e-3"]
        if train.main(words) != 0:
            raise SystemExit(1)
        return json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))["val_loss"]


def main(argv: Sequence[str] | None = None) -> None:
    usage = "python experiments/muon_for_experts.py [--FLAG VALUE ...]"
    flags = cli.program_parser("muon_for_experts.py", usage, __doc__)
    flags.add_argument("--steps", type=int, default=200, help="(default: 200)")
    flags.add_argument("--input_file", default="data/input.txt", help="(default: data/input.txt)")
    args = flags.parse_args(argv)
    rows = []
    for name, (optimizer, groups) in WAYS.items():
        cells = []
        for lr in RATES:
            found = val_loss(optimizer, groups, lr, ["--steps", str(args.steps), "--input_file", args.input_file])
            cells.append(f"{found:.4f}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    print("| matrices of the blocks by | " + " | ".join(f"lr {lr:g}" for lr in RATES) + " |")
    print("| --- | " + " | ".join("---:" for _ in RATES) + " |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
