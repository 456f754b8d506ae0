"""edgeroute inside a program: one model, several answers, statistics, a clean end.

python examples/embed_sync.py [MODEL]
"""

import sys

import edgeroute


def main() -> None:
    """Answer two questions, the second as it comes."""
    model = sys.argv[1] if len(sys.argv) > 1 else None  # None: the default model
    with edgeroute.Runtime(model, memory="2GiB", n_ctx=2048) as runtime:
        whole = runtime.generate(
            messages=[{"role": "user", "content": "Name one river."}], max_tokens=24
        )
        print(whole.text, f"[{whole.stats.decode_tok_s:.0f} tok/s, {whole.finish_reason}]")
        with runtime.stream("The three laws of robotics are", max_tokens=48) as answer:
            for chunk in answer:
                print(chunk.text, end="", flush=True)
        print()


if __name__ == "__main__":
    try:
        main()
    except edgeroute.EdgerouteError as error:
        sys.exit(f"edgeroute: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
