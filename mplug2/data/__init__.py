"""From files to batches: what a record is and how the JSONL files are read (`records.py`), how pictures and clips are
decoded (`media.py`), and how both become batches of one kind a step (`loader.py`)."""
