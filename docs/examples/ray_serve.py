"""Several copies of hybrid's server behind one address, on one machine or many, with Ray Serve.

    pip install 'ray[serve]' '.[server]'
    python docs/examples/ray_serve.py -m stories --replicas 2 --threads 1

Each replica is the whole server (`hybrid.server.create_app`) in a process of its own. Ray spreads
the requests over them, starts those anew that die, and adds machines (docs/scaling.md). The packed
weights are mapped from one file, so replicas on one machine share their memory.
"""

from __future__ import annotations

import argparse
import time

import ray
from ray import serve
from starlette.applications import Starlette


def application(model: str, *, replicas: int, **options: object) -> serve.Application:
    """Return the Ray application. `options` are those of `hybrid.load`."""

    def build() -> Starlette:
        """Load the model in the replica, and return its ASGI application."""
        import hybrid
        from hybrid.server import create_app

        return create_app(hybrid.load(model, mmap=True, **options))

    threads = options["threads"]
    server = serve.ingress(build)()
    return serve.deployment(
        server,
        name="hybrid",
        num_replicas=replicas,
        ray_actor_options={"num_cpus": threads},
        max_ongoing_requests=64,  # as many as a replica's queue takes
        graceful_shutdown_timeout_s=60,
        health_check_timeout_s=60,
    ).bind()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", default="stories")
    parser.add_argument("--quant", default="q8")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each replica")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    ray.init(num_cpus=args.replicas * args.threads + 1, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    app = application(args.model, replicas=args.replicas, threads=args.threads, quant=args.quant)
    serve.run(app, name="hybrid", route_prefix="/")
    print(f"http://127.0.0.1:{args.port}", flush=True)
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        serve.shutdown()


if __name__ == "__main__":
    main()
