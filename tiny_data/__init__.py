"""The tiny world: colored handwritten digits that move, with captions and questions, generated in seconds.

    from tiny_data import ensure
    root = ensure()            # the folder of the default world, which is written first if it does not exist

Read the files in this order: `world.py` (scenes, and what is true of them), `scenes.py` (what each split may show),
`render.py` (drawing), `tasks.py` (records), `writer.py` (files).
"""

from tiny_data.writer import Sizes, ensure, write

__all__ = ["Sizes", "ensure", "write"]
