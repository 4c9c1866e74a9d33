"""A Gradio app: `pip install 'lsast[cpu]' gradio`, then `python examples/gradio/app.py`."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # else Gradio reports to its maker, from its import on

import gradio
import numpy as np
from PIL import Image

import lsast

stylizer = lsast.load()


def paint(picture: np.ndarray, style: str, strength: float, seed: float | None) -> Image.Image:
    """The painting of a picture [H, W, 3]."""
    return stylizer.stylize(picture, style, strength=strength, seed=int(seed or 0)).image


inputs = ["image", gradio.Dropdown(stylizer.styles), gradio.Slider(0.1, 1, 0.9), gradio.Number(0, label="seed")]
app = gradio.Interface(paint, inputs, "image", title="lsast")
if __name__ == "__main__":
    app.launch()
