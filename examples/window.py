"""A window that paints, with Tk: choose a picture, watch it come, stop it, save it.

    python examples/window.py

Needs `pip install 'lsast[cpu]'` and a Python with Tk. The window never waits: painting happens in a thread of its own,
and what it has to show is fetched by the window's own clock, for Tk may be touched by one thread only.
"""

import queue
import threading
import tkinter
from tkinter import filedialog, ttk
from typing import Any

from PIL import Image, ImageTk

import lsast

SIZE = (640, 480)


class Painter:
    """Paints one picture after another in the background; knows nothing of windows."""

    def __init__(self, stylizer: lsast.Stylizer) -> None:
        self._stylizer = stylizer
        self._token = lsast.CancelToken()
        self.news: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        """("preview", (share done, image)), then one of ("done", Result), ("stopped", None), ("failed", message)."""

    def start(self, picture: Any, **options: Any) -> threading.Thread:
        """Paint `picture`; a painting that is under way is stopped."""
        self.stop()
        self._token = token = lsast.CancelToken()

        def on_step(step: int, total: int, preview: Any) -> None:
            self.news.put(("preview", (step / total, preview())))

        def paint() -> None:
            try:
                self.news.put(("done", self._stylizer.stylize(picture, **options, on_step=on_step, cancel=token)))
            except lsast.CancelledError:
                self.news.put(("stopped", None))
            except lsast.LsastError as error:
                self.news.put(("failed", str(error)))

        thread = threading.Thread(target=paint, daemon=True)
        thread.start()
        return thread

    def stop(self) -> None:
        """Stop the painting within a step."""
        self._token.cancel()


class Window:
    """The window."""

    def __init__(self, root: tkinter.Tk, stylizer: lsast.Stylizer) -> None:
        self._root = root
        self._painter = Painter(stylizer)
        self._result: lsast.Result | None = None
        root.title("lsast")
        bar = ttk.Frame(root, padding=8)
        bar.pack(fill="x")
        self.style = tkinter.StringVar(value=stylizer.styles[0])
        ttk.Button(bar, text="Open …", command=self._open).pack(side="left")
        ttk.Combobox(bar, textvariable=self.style, values=stylizer.styles, width=28).pack(side="left", padx=8)
        ttk.Button(bar, text="Stop", command=self._painter.stop).pack(side="left")
        ttk.Button(bar, text="Save …", command=self._save).pack(side="left", padx=8)
        self.progress = ttk.Progressbar(bar, maximum=1.0)
        self.progress.pack(side="left", fill="x", expand=True)
        self.says = tkinter.StringVar(value="Open a picture. A style may be a mix: vangogh:0.6+monet:0.4")
        ttk.Label(root, textvariable=self.says, padding=8).pack(fill="x")
        self.canvas = tkinter.Label(root)
        self.canvas.pack()
        self._show(Image.new("RGB", SIZE, "white"))
        self._listen()

    def paint(self, picture: Any) -> None:
        """Paint a picture in the style that is chosen."""
        self._result = None
        self.says.set(f"{self.style.get()} …")
        self._painter.start(picture, style=self.style.get())

    def _open(self) -> None:
        if name := filedialog.askopenfilename():
            self.paint(name)

    def _save(self) -> None:
        if self._result and (name := filedialog.asksaveasfilename(defaultextension=".png")):
            self._result.save(name)

    def _listen(self) -> None:
        while not self._painter.news.empty():
            kind, what = self._painter.news.get()
            if kind == "preview":
                self.progress["value"] = what[0]
                self._show(what[1])
            elif kind == "done":
                self._result = what
                self._show(what.image)
            self.says.set({"done": "Done.", "stopped": "Stopped.", "failed": what}.get(kind, self.says.get()))
        self._root.after(50, self._listen)

    def _show(self, image: Image.Image) -> None:
        scale = min(SIZE[0] / image.width, SIZE[1] / image.height)
        shown = image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)))
        self._photo = ImageTk.PhotoImage(shown, master=self._root)  # Tk shows it only as long as somebody holds it
        self.canvas.configure(image=self._photo)


def main() -> None:
    """Open the window."""
    root = tkinter.Tk()
    with lsast.load() as stylizer:
        Window(root, stylizer)
        root.mainloop()


if __name__ == "__main__":
    main()
