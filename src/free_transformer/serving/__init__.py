"""
An HTTP server compatible with OpenAI's completions API, with plans: `free-transformer serve`.

The tokens of a request pass through these modules, in this order:

    app        HTTP: completions, health, metrics
    requests   prepares texts from the body of a client request; `schema` has the fields
    engine     one thread that generates all texts together, one token of each per step
    batch      runs the model: `torch_batch` or `onnx_batch`
    stream     turns sampled tokens into chunks of text
    responses  turns chunks into OpenAI's JSON

Only `torch_batch` imports torch.
"""
