"""Silences what packages say while they are imported, on every start of the command line."""

import logging

# torchao names each kernel that it has for GPUs alone, and PyTorch how torchao registers its types.
for package in ("torchao", "torch.utils._pytree"):
    logging.getLogger(package).setLevel(logging.ERROR)
