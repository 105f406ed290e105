"""Custom Gradio components of the page: switches for bits, the map of plans, the lane of plans."""

from collections.abc import Sequence

import gradio as gr

SWITCHES = """<div class='ft-switches' role='group' aria-label='Bits of the plan'>
${value.split('').map(function (bit, place) {
  var why = dead[place] || '';
  return "<button type='button' data-place='" + place + "' aria-pressed='" + (bit == '1') + "' class='"
    + (bit == '1' ? 'ft-on ' : '') + (why ? 'ft-dead' : '') + "' title='"
    + (why ? 'bit ' + place + ' ' + why : 'flip bit ' + place) + "'><b>" + bit + "</b><small>bit " + place
    + "</small></button>";
}).join('')}</div>"""

FLIP = """element.addEventListener('click', function (event) {
  var button = event.target.closest('button[data-place]');
  if (!button) return;
  var place = +button.dataset.place, value = props.value;
  props.value = value.slice(0, place) + (value[place] == '1' ? '0' : '1') + value.slice(place + 1);
  trigger('input', {place: place});
});"""

CHOOSE = """function choose(event) {
  var chosen = event.target.closest('[data-choice]');
  if (chosen && (event.type == 'click' || event.key == 'Enter' || event.key == ' ')) {
    if (event.key == ' ') event.preventDefault();
    trigger('select', {choice: chosen.dataset.choice});
  }
}
element.addEventListener('click', choose);
element.addEventListener('keydown', choose);"""


def switches(plan: str, dead: Sequence[str | None]) -> gr.HTML:
    """
    Creates one button per bit. The value is the plan, such as `"01101001"`; a click flips a bit and sends `input`.

    Args:
        dead: for each bit, the reason why it has no effect, None for a live one.
    """
    reasons = [reason or "" for reason in dead]
    return gr.HTML(plan, html_template=SWITCHES, js_on_load=FLIP, dead=reasons, elem_id="bits")


def choices(markup: str = "", elem_id: str | None = None) -> gr.HTML:
    """Creates markup in which a click on an element with `data-choice` sends `select` with that choice."""
    return gr.HTML(markup, js_on_load=CHOOSE, elem_id=elem_id)
