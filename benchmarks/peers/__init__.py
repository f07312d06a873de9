"""Other libraries that encode texts on a CPU, measured beside fastlm.

    python -m benchmarks.peers --model DIR --peers openvino,onnxruntime,ctranslate2 --threads 2

Each runs in a process of its own, in turn with the others, from texts to embeddings, at its best batch size. A peer is
a module here with `OPTIONS`, `BATCHES`, and `load(directory, threads)`, which returns a `Run` of
common.py.
"""
