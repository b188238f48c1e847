"""The demo page of scripts/demo.py: what it loads, decodes and shows. Only `page` needs Gradio."""
