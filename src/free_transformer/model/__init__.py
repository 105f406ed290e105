"""The method: a Llama with a plan. Modules here import only each other, because saved models include a copy of them."""
