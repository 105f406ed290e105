"""The method: a Llama with a plan. Modules import only from this folder, whose files a saved model carries."""
