"""Silences messages that other packages print on every start of the command line."""

import logging
import os

# torchao lists kernels that need a GPU, PyTorch warns about torchao's types, and lm_eval logs everything.
for package in ("torchao", "torch.utils._pytree", "lm_eval"):
    logging.getLogger(package).setLevel(logging.ERROR)
# read by `transformers` when it is imported, which takes seconds; here it may not be needed, or not be there
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
