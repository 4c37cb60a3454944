"""Serves a trained model, OpenAI-compatible: python -m stem_jax.serve --workdir=runs/tiny"""

import sys

from stem_jax import background, cli
from stem_jax.jax_start import start_jax
from stem_jax.kept_memory import take_large_pages
from stem_jax.serving.flags import KEY_VARIABLE, is_loopback, open_to_all, parse


def main(argv: list[str]) -> None:
    """Parses flags, loads the run and serves it until SIGTERM."""
    args = parse(argv, __doc__)
    take_large_pages()
    start_jax(args.compilation_cache)
    from stem_jax.data.packing import optional

    for package in ("starlette", "uvicorn"):
        optional(package, "stem_jax.serve")
    from stem_jax.checkpoints.loading import load_run
    from stem_jax.editing.patch import edited_run
    from stem_jax.editing.patch_file import read_patch
    from stem_jax.serving.app import make_app
    from stem_jax.serving.call_reader import read_for
    from stem_jax.serving.engine import Engine
    from stem_jax.serving.http_server import bound_socket, serve
    from stem_jax.serving.service import Service

    with bound_socket(args.host, args.port) as own:
        run = load_run(args.workdir, args.step, args.resident_rows, devices=args.devices)
        run = edited_run(run, [read_patch(path) for path in args.edits])
        name = args.workdir.resolve().name if args.model_name is None else args.model_name
        reader = read_for(run.config, run.tokenizer, name, args.chat_template)
        parts = run.config, run.params, run.rows, run.tokenizer, run.mesh
        engine = Engine(*parts, slots=args.slots, queue=args.max_queue)
        service = Service(engine, reader)
        host, port = own.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        if open_to_all(args.host, args.api_key):
            print(f"note: whoever reaches {host} may use it: no {KEY_VARIABLE}", file=sys.stderr)
        if reader.chat is None and run.tokenizer.chat_template is not None:
            print(f"note: {reader.no_chat}", file=sys.stderr)
        print(f"compiling for {args.slots} slots of {reader.context} tokens", flush=True)
        serve(
            service,
            make_app(service, args.api_key, local=is_loopback(args.host)),
            own,
            background.begin(engine.start, "compile"),
            args.write_timeout,
            args.drain_timeout,
            lambda: print(f"serving {name} at {address}", flush=True),
        )
        if not background.under_way():
            engine.close()
            run.close()


if __name__ == "__main__":
    cli.run(main)
