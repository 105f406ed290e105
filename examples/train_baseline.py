"""Train the baseline, the same Llama without a plan: the same code with other settings."""

from train_free import main

if __name__ == "__main__":
    main("configs/baseline.yaml")
