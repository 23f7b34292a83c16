"""The output of an evaluation without training: evaluation.md, and the table for the console."""

from collections.abc import Mapping
from typing import Any

from drep_jax.report.as_markdown import drawn
from drep_jax.report.blocks import Block, Heading, Table, Text
from drep_jax.report.console import drawn_table
from drep_jax.report.lines import data_lines, left_out_lines, protocol_lines
from drep_jax.report.tables import results_table


def evaluation_text(content: Mapping[str, Any]) -> str:
    """Returns the text for the console: the state of every arm, and the results."""
    left_out = "".join(f"\n{line}" for line in (*left_out_lines(content["metrics"]), *protocol_lines(content)))
    return f"{drawn_table(_arms(content))}\n\n{drawn_table(_results(content))}{left_out}"


def evaluation_markdown(content: Mapping[str, Any]) -> str:
    """Returns evaluation.md."""
    environment = content["environment"]
    blocks: list[Block] = [
        Heading("Arms"),
        _arms(content),
        Heading("Results"),
        _results(content),
        *map(Text, protocol_lines(content)),
        *map(Text, left_out_lines(content["metrics"])),
        Heading("Images"),
        *map(Text, data_lines(content)),
        Text(
            f"Made by `{environment['command']}` on {environment['date']} from revision "
            f"{environment['git_revision'] or 'unknown'}."
        ),
    ]
    return "\n\n".join(["# Evaluation without training", *drawn(blocks)]) + "\n"


def _arms(content: Mapping[str, Any]) -> Table:
    rows = [[name, _standing(facts), facts["digest"][:12]] for name, facts in content["arms"].items()]
    return Table(["arm", "what it is", "digest"], rows, "lll")


def _standing(facts: Mapping[str, Any]) -> str:
    if "weights" in facts:
        return facts["weights"]
    if not facts["steps"]:
        return "solved"
    return f"step {facts['step']} of {facts['steps']}" + ("" if facts["step"] >= facts["steps"] else ", unfinished")


def _results(content: Mapping[str, Any]) -> Table:
    return results_table({"metrics": content["metrics"], "exported": None})
