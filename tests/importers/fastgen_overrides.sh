#!/bin/bash
# Written for these tests: words that FastGen's train.py takes behind a dash.
torchrun --nproc_per_node=8 train.py --config=fastgen/configs/experiments/WanT2V/config_dmd2.py - \
  trainer.max_iter=100 model.guidance_scale=4.0
