"""The tiny world: handwritten digits in colour that move, with captions and questions, made in seconds.

    from tiny_data import ensure
    root = ensure()            # the default world, from the cache or freshly written

Read `world.py` (what there is and what is true of it), `scenes.py` (what each split may show), `render.py` (drawing),
`tasks.py` (records) and `writer.py` (files), in this order.
"""

from tiny_data.writer import Sizes, ensure, write

__all__ = ["Sizes", "ensure", "write"]
