"""The model, one module of the paper per file.

Read in this order: shapes, attention, layers, patch_embed, local_temporal, vision_encoder, text_encoder, universal,
fusion, decoder, heads, mplug2. Skip `kernels.py` at first: it holds faster forms of operations that have a plain one.
"""
