"""Renders a chat template of somebody else in a process of its own, with limits; started as a script, on its own.

Jinja's sandbox keeps a template from reaching Python, but not from looping or building text without end.
"""

import json
import resource
import sys

SECONDS, MEGABYTES = 3, 1024


def render(source: str, messages: list[dict[str, str]], for_generation: bool) -> dict[str, str]:
    """{"text": ...}, or {"refusal": what the template says} or {"error": what went wrong}."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    refusals: list[str] = []

    def refuse(message: str) -> None:
        refusals.append(str(message))
        raise ValueError(message)

    environment.globals["raise_exception"] = refuse
    try:
        template = environment.from_string(source)
        return {"text": template.render(messages=messages, add_generation_prompt=for_generation)}
    except Exception as error:  # whatever a template does wrong
        return {"refusal": refusals[-1]} if refusals else {"error": f"{type(error).__name__}: {error}"[:300]}


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEGABYTES * 2**20, MEGABYTES * 2**20))
    json.dump(render(*json.load(sys.stdin)), sys.stdout)


if __name__ == "__main__":
    main()
