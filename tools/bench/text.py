"""Fixed English and code for the benchmarks, and prompts for comparing greedy answers."""

from collections.abc import Callable, Sequence
from typing import Final

TEXT: Final = '''\
A lighthouse keeper once wrote down the weather every three hours for forty-one years. Nobody
had asked for it. The first book begins with a storm from the north-west that took two slates
and the lid of the rain barrel; the last one ends with a calm morning, a thin fog over the
channel, and the remark that the new lamp needs no keeper. When the station was closed, the
books went into a cellar, and from there to a university, where a student typed all 119,720
lines into a table. It turned out that the keeper had measured the water, too. His thermometer
was a good one, made in 1887 by a firm that still exists, and it read 0.3 degrees too high.

Today the table is used to check models of the North Sea. A model predicts the temperature of
a cell of water from its neighbours, from the wind and from the sun. If the cells are small,
the answer is good but slow; if they are large, the answer is fast but wrong near the coast,
where the depth changes within a few hundred metres. So people use large cells where nothing
happens and small ones where something does. Deciding what "something happens" means is most
of the work. The simplest rule compares two runs, one coarse and one fine, and splits a cell
when they disagree by more than a limit.

def refine(cells, limit, max_level=6):
    """Split every cell in which a coarse and a fine estimate differ by more than `limit`."""
    done, queue = [], list(cells)
    while queue:
        cell = queue.pop()
        coarse, fine = cell.estimate(steps=1), cell.estimate(steps=4)
        if abs(coarse - fine) <= limit or cell.level == max_level:
            done.append((cell, fine))
            continue
        queue.extend(cell.split())
    return sorted(done, key=lambda pair: (pair[0].y, pair[0].x))

The same idea appears in many places. A photograph is stored with more bits where there are
edges. A surveyor walks closer to a river bend than to a straight road. A teacher who reads
thirty essays spends most of the afternoon on four of them. What they share is a cheap look
that decides whether an expensive look is worth its price, and the art lies in making the
cheap look honest: it must be wrong rarely, and it must know when it does not know.

struct Reading { float celsius; int64_t time_s; bool corrected; };

static int correct(std::vector<Reading> & log, float bias) {
    int n_changed = 0;
    for (auto & r : log) {
        if (r.corrected || r.celsius < -40.0f) {
            continue;  // -99.9 marks a broken thermometer: leave it alone
        }
        r.celsius -= bias;
        r.corrected = true;
        n_changed++;
    }
    return n_changed;
}

Errors hide best in the parts that everybody trusts. In the winter of 1912 the readings at six
in the morning are warmer than those at nine, eleven days in a row. A first guess was a warm
current; a second, a lazy keeper who invented numbers. The true reason was found in a letter to
his sister: he had carried the thermometer into the kitchen, because the ink froze, and read
it there after breakfast. The letter is dated 14 January. The student marked the eleven lines
and kept them, with a note. "Do not delete what you can explain," her professor used to say,
"and do not explain what you can measure again."

SELECT station, strftime('%Y-%m', time, 'unixepoch') AS month,
       round(avg(celsius), 2) AS mean_c, count(*) AS n
FROM readings
WHERE corrected = 1 AND celsius > -40
GROUP BY station, month
HAVING n >= 200
ORDER BY mean_c DESC
LIMIT 12;

What does a keeper do all day? He trims the wick, winds the clockwork that turns the lens,
polishes the glass until there is no mark on it, paints the railings, repairs the boat, and
waits. The lens weighs two tonnes and floats on mercury, so that a child can turn it with one
finger. Every ship that passes sees three flashes and a pause of nine seconds; a captain who
counts them knows where he is. 3 + 1 = 4 signs would be another coast: 2,340 km to the south.
'''

PROMPTS: Final = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at a lower temperature on a mountain because",
    "Three things to check before a long bicycle ride:\n1.",
    "The opposite of 'generous' is",
    "import json\n\ndef read_config(path):\n",
    "Dear Ms. Keller,\n\nthank you for your letter of",
    "A short history of the printing press:",
    "Q: How many legs do two spiders and a cat have together?\nA:",
    "In 1969, the first people to walk on the Moon",
    "SELECT name, price FROM products WHERE",
    "The quick brown fox",
    "Recipe for a simple tomato soup. Ingredients:",
    "Explain to a child why the sky is blue.",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):",
    "My grandmother always said that",
    "The difference between a list and a tuple in Python is",
    "Breaking news: scientists have discovered",
    "To be, or not to be, that is",
)


def text_tokens(encode: Callable[[str], list[int]], n_tokens: int) -> list[int]:
    """Return the first `n_tokens` tokens of the text, which begins again where it ends."""
    once = encode(TEXT)
    return (once * (n_tokens // len(once) + 1))[:n_tokens]


def shifted(tokens: Sequence[int], n_streams: int, n_tokens: int) -> list[list[int]]:
    """Cut different prompts of equal length out of one text, one per stream."""
    return [list(tokens[i * 7 : i * 7 + n_tokens]) for i in range(n_streams)]
