"""Shows how to make a video of each prompt of one's own and to write it as MP4, with what was drawn beside it.

python -m examples.prompts_to_mp4 logs/quickstart/self_forcing_dmd prompts.txt --out outputs/mine --seed 3

prompts.txt has a prompt a line. `inference.py --prompts` does the same with several videos at a time.
"""

import argparse
import json
from pathlib import Path

import fewstep
from utils.data.prompts import load_prompts
from utils.video import write_video


def main() -> None:
    parser = argparse.ArgumentParser(description="A video of each prompt of a file.")
    parser.add_argument("run", help="a run's folder, one of its checkpoints, or a released model's folder")
    parser.add_argument("prompts", type=Path, help="a .txt, .csv, .jsonl or .parquet file")
    parser.add_argument("--out", type=Path, default=Path("outputs/examples"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    student = fewstep.load(args.run)
    sampling, fps = fewstep.Sampling(seed=args.seed), student.generator.config.fps
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "videos.jsonl").open("w", encoding="utf-8") as index:
        for number, prompt in enumerate(load_prompts(args.prompts)):
            pixels = student.video(prompt, sampling, number=number)  # the number keys its noise, whatever came before
            path = write_video(args.out / f"{number:04d}.mp4", pixels, fps)
            print(path)
            index.write(json.dumps({"video": path.name, "prompt": prompt, "seed": args.seed, "number": number}) + "\n")


if __name__ == "__main__":
    main()
