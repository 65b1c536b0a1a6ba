"""`python -m tests.distributed.losses`: the table of docs/guarantees.md: how far losses of several ranks are from one's.

Trains the small DMD recipe of the tests for ten iterations on each split.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests import forked
from tests.small import DISTILLATION, config, save_networks, with_weights
from utils.config import to_yaml
from utils.logging import read_jsonl

STEPS = 10
SPLITS = {
    "2 ranks, sharded": (2, []),
    "4 ranks, sharded": (4, []),
    "4 ranks, 2 copies of 2 shards": (4, ["parallel.replicate=2", "parallel.shard=2"]),
    "4 ranks, 2 videos of 2 ranks each": (4, ["parallel.shard=2", "parallel.sequence=2"]),
    "2 ranks, DeepSpeed ZeRO-2": (2, ["parallel.engine=deepspeed"]),
    "2 ranks, DeepSpeed ZeRO-3": (2, ["parallel.engine=deepspeed", "parallel.deepspeed={zero_stage: 3}"]),
}


def losses(folder: Path, name: str, ranks: int, *changes: str) -> dict[str, list[float]]:
    """Both losses of each iteration."""
    run = folder / name.replace(" ", "_")
    recipe = ["--config_path", str(folder / "run.yaml"), "--logdir", str(run), "--no_save", *changes]
    done = forked.run(ranks, "train.py", *recipe)
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(run / "metrics.jsonl")
    assert len(rows) == STEPS
    return {key: [row[key] for row in rows if key in row] for key in ("student/loss", "critic/loss")}


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        save_networks(folder / "weights")
        training = {"max_steps": STEPS, "global_batch_size": 4, "micro_batch_size": 1, "log_every": 1}
        small = config(with_weights(DISTILLATION, folder / "weights"), training=training)
        (folder / "run.yaml").write_text(to_yaml(small))
        expected = losses(folder, "1 rank", 1)
        print("| split | student's loss | critic's loss |\n|---|---|---|")
        for name, (ranks, changes) in SPLITS.items():
            found = losses(folder, name, ranks, *changes)
            worst = [
                max(abs(a - b) / abs(b) for a, b in zip(found[key], expected[key], strict=True)) for key in expected
            ]
            print(f"| {name} | {worst[0]:.1g} | {worst[1]:.1g} |")


if __name__ == "__main__":
    main()
