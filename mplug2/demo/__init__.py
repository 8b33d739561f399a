"""The interactive page: `python -m mplug2.demo`. `views.py` computes, `page.py` shows it with Gradio."""
