"""Torch runs in one thread: these policies are small, and other processes work beside."""

import torch

torch.set_num_threads(1)
