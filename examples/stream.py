"""Shows how a script uses a student: its frames come block by block, while it goes on generating.

python -m examples.stream logs/quickstart/self_forcing_dmd "a blue star moving up"
"""

import sys
import time

import fewstep

if len(sys.argv) != 3:
    sys.exit('usage: python -m examples.stream RUN "PROMPT"')
run, prompt = sys.argv[1:]
student = fewstep.load(run)
began = time.perf_counter()
for number, pixels in enumerate(student.stream(prompt, fewstep.Sampling(seed=0)), start=1):
    frames, _, height, width = pixels.shape  # in [0, 1], on the CPU: to a window, a socket, an encoder
    seconds = time.perf_counter() - began
    print(f"block {number} after {seconds:.2f} s: {frames} frames of {width} x {height}", flush=True)
