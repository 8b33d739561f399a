"""Data: from files on disk to batches of tensors.

Read in this order: `records.py` (the JSONL format), `text.py` (cleaning and tokenizing), `media.py` and `transforms.py`
(decoding and augmenting images and videos), `samples.py` (records joined into training samples), `batches.py` (which
samples a step sees, and how they become tensors), `loader.py` (worker processes), `shards.py` and `shard_stream.py`
(tar shards, for data sets that do not fit in a folder). `adapters/` converts public data sets to our JSONL files;
`check.py` checks the result.
"""
