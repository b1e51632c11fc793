"""Whether a kernel may overflow 32 bits on its way to an address, read from its Triton IR."""

from __future__ import annotations

import re

_RESULT = re.compile(r"^\s*(%[\w#]+)(?::\d+)? = ([\w.]+)(.*)$")
_VALUE = re.compile(r"%[\w#]+")
_LOOP = re.compile(r"(%[\w#]+) = (%[\w#]+)")
_TYPE = re.compile(r"\bi32$|xi32>$")


def narrow_products(ttir: str) -> list[str]:
    """Address computations with an offset that holds a product of 32 bits.

    A multiplication by one, which an unrolled loop leaves behind, is none.
    """
    narrow: set[str] = set()
    ones: set[str] = set()
    found = []
    for line in ttir.splitlines():
        code = line.partition(" loc(")[0].rstrip()
        if "scf.for" in code:
            narrow |= {name for name, start in _LOOP.findall(code) if start in narrow}
        match = _RESULT.match(code)
        if match is None:
            continue
        result, operator, rest = match.groups()
        values = _VALUE.findall(rest)
        if operator == "arith.constant" and re.match(r"\s+(dense<)?1>? :", rest):
            ones.add(result)
        product = operator == "arith.muli" and _TYPE.search(code) and not ones & set(values)
        if operator == "tt.addptr" and values[1] in narrow:
            found.append(code.strip())
        # What is loaded, or a verdict on it, carries no overflow on.
        carries = operator not in ("tt.load", "tt.addptr", "arith.cmpi")
        if product or (carries and narrow & set(values)):
            narrow.add(result)
    return found
