"""The page of `gripvlm demo`, in Gradio: it shows what `compare` and `show` make, and has no logic of its own."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from gripvlm.budget import Budget
from gripvlm.demo.compare import Answered, Asker, Comparison
from gripvlm.demo.show import described, sheet, why
from gripvlm.errors import GripError
from gripvlm.serve.settings import Limits
from gripvlm.tasks import Sample, open_image

__all__ = ["build", "launch"]

FULL = "all tokens"
CSS = """
.card { gap: .3rem; }
.card .answer { font-size: 1.15rem; font-weight: 600; overflow-wrap: anywhere; }
.card .method { font-weight: 600; overflow-wrap: anywhere; }
.card .facts { opacity: .8; font-size: .88rem; overflow-wrap: anywhere; }
#why { position: sticky; top: 0; z-index: 2; min-height: 3rem; padding: .5rem .7rem; border-radius: 8px;
  border: 1px solid var(--border-color-primary); background: var(--body-background-fill); }
"""
SECONDS_KEPT = 3600  # files of visitors on the disk


def build(asker: Asker, pruners: Sequence[str], examples: Sequence[Sample], keep: Budget, model: str) -> gr.Blocks:
    """The page.

    Args:
        pruners: specs that visitors may choose from; all are shown at first.
        examples: questions about pictures to begin with; may be empty.
        keep: where the slider stands at first, a fraction.
        model: what the page calls the model.
    """
    limits = Limits()
    names = [FULL, *pruners]
    first = examples[0].images[0] if examples else None

    with gr.Blocks(title="gripvlm demo", analytics_enabled=False, delete_cache=(SECONDS_KEPT, SECONDS_KEPT)) as page:
        gr.Markdown(
            f"# Which visual tokens does {model} need?\n"
            "Each method keeps some of the picture's tokens for your question, and the model answers from those alone. "
            "Times are of one run; `gripvlm bench` measures with care."
        )
        asked, image = gr.State(None), gr.State(first)
        with gr.Row():
            with gr.Column(scale=1, min_width=240):
                shown = gr.Image(first, type="pil", label="Picture", interactive=False, height=230, buttons=[])
                upload = gr.UploadButton("Upload a picture", elem_id="upload")  # any file: what is wrong we say
            with gr.Column(scale=3, min_width=300):
                labels = [(f"{one.question} ({one.family})", number) for number, one in enumerate(examples)]
                chosen = gr.Dropdown(labels, value=0 if labels else None, label="Examples", visible=bool(labels))
                question = gr.Textbox(examples[0].question if examples else "", label="Question", elem_id="question")
                slider = gr.Slider(
                    1, 100, round(100 * keep.value), step=1, label="Visual tokens kept, %", elem_id="keep", buttons=[]
                )
                methods = gr.CheckboxGroup(list(pruners), value=list(pruners), label="Methods")
                button = gr.Button("Ask", variant="primary", elem_id="ask")
        reason = gr.Markdown("Ask, then tap a patch to see why its token stays or goes.", elem_id="why")
        cards = []
        with gr.Row():
            for name in names:
                # two beside one another on a phone
                with gr.Column(min_width=150, elem_classes="card", visible=name == FULL) as column:
                    gr.HTML(f'<div class="method">{html.escape(name)}</div>')
                    drawing = gr.Image(type="pil", show_label=False, interactive=False, buttons=[])
                    words = gr.HTML()
                cards.append((column, drawing, words))

        def compare(picture: Image.Image | None, text: str, share: float, wanted: list[str]) -> list[Any]:
            if picture is None:
                raise _refusal("there is no picture yet: upload one")
            try:
                found = asker.compare([picture], text, wanted, Budget(share / 100))
            except GripError as error:
                raise _refusal(str(error)) from None
            by_name = {FULL: found.full} | {one.method: one for one in found.pruned}
            updates: list[Any] = [found, found.no_picture or "Tap a patch to see why its token stays or goes."]
            for name in names:
                updates += _card(found, name, by_name.get(name))
            return updates

        def read(path: str) -> tuple[Any, Any]:
            name = repr(Path(path).name)
            try:
                picture = open_image(_content(path, limits.body_bytes, name), name, max_pixels=limits.pixels)
            except GripError as error:
                raise _refusal(f"{error}. A PNG, JPEG or WebP file will do.") from None
            return picture, picture

        def example(number: int) -> tuple[Any, Any, str]:
            picture = examples[number].images[0]
            return picture, picture, examples[number].question

        def explain(found: Comparison | None, name: str, event: gr.SelectData) -> str:
            by_name = {} if found is None else {FULL: found.full} | {one.method: one for one in found.pruned}
            if found is None or name not in by_name:
                return "Ask first."
            drawn = sheet(found, by_name[name])
            token = None if drawn is None else drawn.token_at(*event.index)
            if token is None:
                return "No token there."
            worth = None if by_name[name].alone else asker.worth(found, by_name[name], [token])[0]
            return html.escape(why(found, by_name[name], token, worth), quote=False)

        # one at a time, whatever asks: there is one model
        alone: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        targets = [asked, reason, *(part for card in cards for part in card)]
        run: dict[str, Any] = {"fn": compare, "inputs": [image, question, slider, methods], "outputs": targets} | alone
        # an error is shown where progress is: there, and not over every picture
        run["show_progress_on"] = reason
        for trigger in (button.click, question.submit, methods.input):
            trigger(**run)
        slider.input(**run, trigger_mode="always_last")  # not each value that it is drawn over
        read_it = upload.upload(read, upload, [image, shown], api_visibility="private", show_progress="hidden")
        read_it.success(**run)
        if examples:
            chosen.input(example, chosen, [image, shown, question], api_visibility="private").success(**run)
            page.load(**run)
        for name, (_, drawing, _words) in zip(names, cards, strict=True):
            drawing.select(_named(explain, name), asked, reason, **alone)
    return page


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Serves the page until Ctrl-C.

    Raises:
        OSError: the port is taken.
    """
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        footer_links=[],
        max_file_size=Limits().body_bytes,
        # the default theme asks Google for its fonts
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
    )
    print(f"Open {page.local_url} in a browser; Ctrl-C ends it.", flush=True)
    page.block_thread()


def _refusal(message: str) -> gr.Error:
    """Shown until it is closed."""
    return gr.Error(message, duration=None, print_exception=False)


def _named(explain: Any, name: str) -> Any:
    """`explain` for one method; Gradio reads off its signature that it wants the event."""

    def of_method(found: Any, event: gr.SelectData) -> str:
        return explain(found, name, event)

    # Gradio compares the annotation itself, and not its name
    of_method.__annotations__["event"] = gr.SelectData
    return of_method


def _card(found: Comparison, name: str, answered: Answered | None) -> list[Any]:
    """Updates of a method's column, picture and words."""
    if answered is None:
        refused = html.escape(found.refused.get(name, ""))
        return [gr.update(visible=name in found.refused), None, f'<div class="facts">{refused}</div>']
    drawn = sheet(found, answered)
    first, *others = map(html.escape, described(found, answered))
    words = f'<div class="answer">{first}</div><div class="facts">{"<br>".join(others)}</div>'
    return [gr.update(visible=True), None if drawn is None else drawn.image, words]


def _content(path: str, most: int, name: str) -> bytes:
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise GripError(f"{name} has more than {most} bytes: make it smaller")
    return content
