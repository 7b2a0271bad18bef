"""Other people's data become our shards: LLaVA, ShareGPT and Qwen-VL JSON, and Hugging Face parquet.

A source is read as a stream of raw records (`json_stream`, `parquet`), each format turns one record into messages and
images (`llava`, `sharegpt`, `qwenvl`, `hub`), and `build` makes it a sample or refuses it with one sentence.
"""
