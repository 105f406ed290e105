"""
A server of completions that steers: `free-transformer serve`.

    app          HTTP: OpenAI's completions with plans, health, metrics
    completions  what a request may ask, and the shape of an answer
    engine       one thread that writes all texts together, a token of each at a time
    batch        what it asks of a model: `torch_batch`, `onnx_batch`

Nothing here imports torch but `torch_batch`.
"""
