"""The model: one file per module of Figure 2.

Read in this order: shapes, attention, layers, patch_embed, local_temporal, vision_encoder, text_encoder, universal,
fusion, decoder, heads, mplug2. Skip kernels.py at first: it only holds faster forms of operations with a plain form.
"""
