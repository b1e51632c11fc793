"""The two commands behind ``fedcore bench``."""

from __future__ import annotations

from bench import kernels, server
from bench.cost import cost_figure, cost_points, sizes
from bench.roofline import roofline_figure
from bench.session import Request, Session


def run_kernels(request: Request) -> None:
    """``fedcore bench kernels``: every operation on its own; with ``out``, a roofline.

    Raises:
        FedcoreError: a wrong option, before anything is measured.
    """
    with Session(request) as session:
        rows = session.measure(kernels.plans(session.setting), memory=False)
        figures = {}
        if request.out is not None:
            figures["roofline"] = roofline_figure(rows, session.limits)
        title = "Every operation on its own"
        session.present("kernels", title, "fedcore bench kernels", rows, figures)


def run_server(request: Request, against: str) -> None:
    """``fedcore bench server``: whole rounds; with ``out``, their cost against each size.

    Raises:
        FedcoreError: a wrong option, before anything is measured.
    """
    names = server.parse_against(against)
    with Session(request) as session:
        rows = session.measure(server.plans(session.setting, names), memory=True)
        figures = {}
        if request.out is not None:
            workloads = session.track(sizes(session.setting), lambda size: size.name)
            device, repeats = session.setting.device, request.repeats
            points = cost_points(workloads, device, session.clock, repeats)
            figures["cost"] = cost_figure(points)
        command = f"fedcore bench server --against {against}"
        session.present("server", "Server rounds", command, rows, figures)
