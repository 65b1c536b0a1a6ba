"""`python demo.py --run logs/x`: a web page where one types a prompt and watches the video while it is made."""

from __future__ import annotations

import os

# Before torch loads OpenMP: threads that spin while they wait starve another process on the same few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from generation.generator import Generator
from generation.sampling import StudentChoice
from serving.command import demo_args
from serving.run import demo
from utils import distributed
from utils.cli import refuse_several_ranks, run_cli


def main() -> int:
    args = demo_args()
    refuse_several_ranks("demo.py")
    generator = Generator.load(
        args.source, distributed.device(), student=StudentChoice(args.weights), tiny_decoder=args.tiny_decoder,
        acceleration=args.acceleration,
    )  # fmt: skip
    return demo(generator, args)


if __name__ == "__main__":
    run_cli(main)
