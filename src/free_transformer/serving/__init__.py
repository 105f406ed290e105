"""
An HTTP server compatible with OpenAI's completions API, with plans: `free-transformer serve`.

The tokens of a request pass through these modules, in this order:

    app        HTTP: completions, health, metrics
    requests   from the body of a client request to prepared texts; `schema` has the fields
    engine     one thread that generates all texts together, one token of each per step
    batch      the model: `torch_batch` or `onnx_batch`
    stream     from sampled tokens to chunks of text
    responses  from chunks to OpenAI's JSON

Only `torch_batch` imports torch.
"""
