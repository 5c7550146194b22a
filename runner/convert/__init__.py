"""Converts checkpoint folders between formats: bf16 to int4, int8, fp8, mxfp4 or nvfp4, and quantized ones back to bf16.

cli.py is the verb; source.py reads and checks a folder; jobs.py decides what becomes of each tensor; engine.py streams
shards in and out, resumes after a kill and publishes the result in one rename; shard.py writes one safetensors file.
"""
