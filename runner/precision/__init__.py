"""What is quantized and how, bit for bit the same in training, in checkpoints and in engines.

plan.py decides, formats.py is the one dispatch over int4.py, fp8.py and fp4.py, audit.py compares the sides.
"""
