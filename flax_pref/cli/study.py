"""When does contrastive guidance pay? A grid of trainings and drawings on the demo world, and a page of it."""

from flax_pref.config import check_output_folder, load_config
from flax_pref.files import one_writer, writing
from flax_pref.programs import PROGRAMS, command


def main(arguments: list[str]) -> None:
    """Measures the cells that the table lacks, and writes the page."""
    config = load_config(arguments, PROGRAMS["study"].config, default="demo/study")
    from flax_pref.compilation import set_up
    from flax_pref.demo.evidence import write_page
    from flax_pref.demo.questions import QUESTIONS
    from flax_pref.demo.study import Study

    set_up()
    if config.quick:
        config = config.shrunk()
    for folder in (config.output, config.results):
        check_output_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
    with one_writer(config.output), writing(config.output):
        rows = Study(config).run()
        page = write_page(rows, config, QUESTIONS, f"{command('study')} --results {config.results}")
    print(f"wrote {page}")
