"""The whole path on the demo world: draw pairs, label them, train modules, compare methods."""

import dataclasses

from flax_pref.config import check_output_folder, dump_config, load_config
from flax_pref.files import one_writer, writing
from flax_pref.programs import PROGRAMS


def main(arguments: list[str]) -> None:
    """Runs the demo and prints what it found."""
    config = load_config(arguments, PROGRAMS["demo"].config, default="demo/demo")
    from flax_pref.compilation import set_up
    from flax_pref.demo.experiment import Demo
    from flax_pref.demo.report import comparison_table, table, text_table

    set_up()
    if config.quick:
        config = config.shrunk()
    check_output_folder(config.output)
    with one_writer(config.output), writing(config.output):
        dump_config(dataclasses.asdict(config), config.output / "config.json")
        if config.pairs_only:
            print(f"wrote {Demo(config).draw_pairs()}")
            return
        report = Demo(config).run()
    print(f"\n{report['prompts']} held-out prompts, {report['seconds']:.0f} s")
    print(text_table(table(report)), text_table(comparison_table(report)), sep="\n\n")
    print(f"\nwrote {config.output / 'report.html'}")
