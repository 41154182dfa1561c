import sys


def main() -> None:
    """`vwlmm`, whose imports may be interrupted too."""
    try:
        from .cli import main as run
    except KeyboardInterrupt:
        print("\nvwlmm: interrupted", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
