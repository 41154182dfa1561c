"""The test suites of transformers and PEFT on VW-LMM and, as the control, on LLaVA: `make peers`.

The tests come with the source distribution of the installed release, from the package index, into
`~/.cache/vwlmm/peers`. A source distribution lacks files that its tests import: `--tests FOLDER`, the `tests` of a
checkout of the same release, has them. Without it, tests that need them do not run.

The table has every test that VW-LMM fails and LLaVA does not. Those in `ARGUED` have a reason.
"""
