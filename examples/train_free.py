"""Train a Free Transformer from a YAML file, in Python, as `free-transformer train` does."""

import argparse

from free_transformer.cli.exit_status import as_command
from free_transformer.training import load_settings, train


def main(default_config: str = "configs/free_transformer.yaml") -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default=default_config)
    parser.add_argument("--use-fsdp", action="store_true", help="shard over the processes that torchrun starts")
    parser.add_argument("overrides", nargs="*", help="changes to the settings, as in training.max_steps=100")
    options = parser.parse_intermixed_args()
    fsdp = ["distributed.fsdp=true", "distributed.data=auto"] if options.use_fsdp else []
    with as_command():
        train(load_settings(options.config, options.overrides + fsdp))


if __name__ == "__main__":
    main()
