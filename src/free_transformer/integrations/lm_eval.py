"""
The `lm_eval` command line with the model `free-transformer` registered. `lm_eval` has no option to find other models:

    python -m free_transformer.integrations.lm_eval --model free-transformer --model_args pretrained=RUN --tasks ...
"""

from free_transformer import quiet  # noqa: F401  # before the imports that it silences


def main() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate

        import free_transformer.integrations.harness  # noqa: F401  # registers the model
    except ImportError as error:
        raise SystemExit(f"lm_eval needs {error.name}: pip install 'free-transformer-lm[lm-eval]'") from error
    cli_evaluate()


if __name__ == "__main__":
    main()
