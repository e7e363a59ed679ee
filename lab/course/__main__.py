"""What have I understood? Fifteen questions, each with a place to write the answer, and a check.

  python -m lab.course        the list: number, minutes, title, and solved, open or wrong
  python -m lab.course 7      question 7; then whether the answer that stands there is right, or a hint

Answers to 4, 5 and 7 are psi, between the banners of ipo.py. To keep one when you go on, copy it to psi_4,
psi_5 or psi_7 there, since a psi must remain. All other answers are lines between the banners of
lab/course/exercises.py. Questions and hints are read from lab/course/EXERCISES.md.
Trap: the list checks all answers, and a bug of question 13 takes some seconds.
"""
import re
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("EXERCISES.md")
QUESTION = r"^## (\d+)\. ([^\n]+) \((\d+) minutes\)\n(.*?)(?=^## |\Z)"


def questions():
    """{number: (title, minutes, text)}"""
    text = re.sub(r"<!--.*?-->\n*", "", PAGE.read_text(encoding="utf-8"), flags=re.S)
    return {int(n): (title, minutes, asked.strip().replace("\\*", "*"))
            for n, title, minutes, asked in re.findall(QUESTION, text, re.M | re.S)}


def run(argv=None):
    # here, since importing torch takes seconds, and a question should not
    import data
    from lab.common import start
    from lab.course import exercises
    own = start.parser(__doc__)
    own.add_argument("number", nargs="?", type=int, help="a question [the list of all]")
    number = own.parse_args(argv).number
    if number is None:
        for n, (title, minutes, _) in questions().items():
            print(f"{n:3} {minutes:>4} min  {title:34} {exercises.state(n)[0]}", flush=True)
    elif number not in questions():
        raise data.Refused(f"there is no question {number}; give a number from 1 to {len(questions())}")
    else:
        state, hint = exercises.state(number)
        place = "ipo.py, psi" if number in exercises.SHARED else f"lab/course/exercises.py, answer_{number}"
        print(f"{place}: {state}{'. Hint: ' if hint else ''}{hint}")


if __name__ == "__main__":
    for n, (title, minutes, text) in questions().items():
        if sys.argv[1:] == [str(n)]:
            print(f"{n}. {title} ({minutes} minutes)\n\n{text}\n", flush=True)
    try:
        from lab.common import start
        import lab.course.exercises  # noqa: F401
    except (Exception, SystemExit) as broken:  # an answer, half typed
        sys.exit(f"course: what you edited does not run ({broken}); mend what stands between the banners")
    sys.exit(start.main("course", run))
