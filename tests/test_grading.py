"""Final answers that both graders must read, and hostile text, which is wrong and costs little."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.answers import dapo, gsm8k

MORE = [
    (gsm8k, "18", "9+9=18\n#### 18\n\n**Note:** 9 per day", True),
    (gsm8k, "18", "The answer is 18\n#### 18 eggs/day", True),
    (gsm8k, "3", "#### 3 bolts", True),
    (gsm8k, "18", "#### 18cm\u00b2", True),
    (gsm8k, "18", "#### \uff11\uff18", True),
    (gsm8k, "1080", "#### \uff11\uff0c\uff10\uff18\uff10", True),
    (gsm8k, "18", "#### \uff11\uff19", False),
    (dapo, "18 \\text{ cm}^2", "\\boxed{18\\text{cm\u00b2}}", True),
    (dapo, "18 \\text{ cm}^2", "\\boxed{18\\text{cm\u00b3}}", False),
    (dapo, "34", "\\boxed{\uff13\uff14}", True),
    (gsm8k, "18", "#### \u200e18", True),
    (gsm8k, "18", "#### $ 18", True),
    (gsm8k, "18", "#### 18$/day", True),
    (gsm8k, "18", "#### $18/day", True),
    (gsm8k, "18", "#### $18.00 per day.", True),
    (gsm8k, "18", "#### 18 dollars per day at the farmers' market", True),
    (gsm8k, "-18", "#### \u221218", True),
    (gsm8k, "-18", "#### \\boxed{-18}", True),
    (gsm8k, "18", "#### Answer\n\n\\boxed{18}", True),
    (gsm8k, "18", "#### Final Answer: \\boxed{18}", True),
    (gsm8k, "18", "#### **Final Answer:** 18", True),
    (gsm8k, "18", "#### **Answer**: 18", True),
    (gsm8k, "18", "####  **18 dollars**", True),
    (gsm8k, "18", "#### 18 \U0001f600", True),
    (gsm8k, "1080", "#### 1,080 grams", True),
    (gsm8k, "18", "#### \\( \\boxed{18} \\)", True),
    (gsm8k, "18", "#### $\\mathbf{18}$", True),
    (gsm8k, "18", "#### $\\text{18 dollars}$", True),
    (gsm8k, "18", "#### 18\\%", True),
    (gsm8k, "18", "#### 18 (in dollars)", True),
    (gsm8k, "18", "#### \u223c 18", False),
    (gsm8k, "18", "#### 1 8 dollars", False),
    (gsm8k, "118", "#### 1 18", False),
    (gsm8k, "18", "#### 18, 20", False),
    (gsm8k, "18", "#### 18 20 22", False),
    (gsm8k, "1820", "#### 18 20", False),
    (gsm8k, "18", "#### 18.5", False),
    (gsm8k, "18", "#### 17.999", False),
    (gsm8k, "1.234", "#### 1,234", False),
    (gsm8k, "1234", "#### 1.234", False),
    (gsm8k, "10", "#### 10,5", False),
    (gsm8k, "105", "#### 10,5", False),
    (dapo, "34", "\\boxed{34} \\text{ is the answer}", True),
    (dapo, "34", "The answer is $\\boxed{34}$, i.e. Answer: 34.", True),
    (dapo, "34", "Answer: 34\n\nLet me know if the answer helps!", True),
    (dapo, "34", "Answer: \\$34", True),
    (dapo, "34", "Answer: \\textbf{34}", True),
    (dapo, "34", "Answer: \\boxed{34}.\n", True),
    (dapo, "34", "$$\nAnswer: 34\n$$", True),
    (dapo, "34", "Answer: 12\n...\nAnswer: 34", True),
    (dapo, "20\\%", "Final Answer: The final answer is $20\\%$. I hope it is correct.", True),
    (dapo, "\\frac{1}{2}", "Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct.", True),
    (dapo, "(3, 4)", "Answer: $(3,4)$. Thanks for asking!", True),
    (dapo, "x+1", "The final answer is $x + 1$. I hope it is correct.<|im_end|>", True),
    (dapo, "20\\%", "Answer: $20\\%$. No wait, that is wrong.", False),
    (dapo, "20\\%", "Answer: $20\\%$. I hope it is $30\\%$.", False),
    (dapo, "\\frac{1}{2}", "Answer: $\\frac{1}{3}$. I hope it is correct.", False),
    (dapo, "34", "First answer: 12 is wrong.\n\\boxed{34}", True),
    *(
        (dapo, "34", text, True)
        for text in ("\\boxed{34\\ }", "Answer: $34\\ $.", "\\boxed{34\\hspace{1em}}", "Answer: <b>34</b>")
    ),
    *((gsm8k, "18", f"#### {text}", True) for text in ("<b>18</b>", "18</s>", "18 <|im_end|>", "$18\\ $")),
    (dapo, "x+1", "\\boxed{x+1\\ }", True),
    (dapo, "34", "\\boxed{34\\\\}", False),
    (dapo, "\\frac16", "\\boxed{0.1\\overline{6}}", True),
    (dapo, "0.\\overline{3}", "\\boxed{\\frac13}", True),
    (dapo, "12.\\overline{09}", "\\boxed{\\frac{133}{11}}", True),
    (dapo, "0.\\overline{3}", "\\boxed{0.3}", False),
    (dapo, "5{:}30", "\\boxed{5:30}", True),
    (dapo, "\\emptyset", "\\boxed{\\varnothing}", True),
    (dapo, "x \\le 5", "\\boxed{x\\leqslant 5}", True),
    (dapo, "x \\le 5", "\\boxed{x < 5}", False),
    # what math-verify drops or folds
    (dapo, "101_2", "\\boxed{101_{2}}", True),
    (dapo, "101_2", "\\boxed{101_3}", False),
    (dapo, "101_2", "\\boxed{101}", True),  # in the base that was asked for
    (dapo, "34", "\\boxed{34_5}", False),
    (dapo, "34", "\\boxed{34_{10}}", True),
    (dapo, "x_1 + x_2", "\\boxed{x_2 + x_1}", True),
    *(
        (dapo, one, f"\\boxed{{{other}}}", False)
        for a, b in (("x", "x'"), ("A", "A^T"), ("n", "N"), ("\\pi", "\\Pi"), ("xy", "XY"))
        for one, other in ((a, b), (b, a))
    ),
    (dapo, "f'(x) = 2x", "\\boxed{2x}", True),
    (dapo, "B", "\\boxed{b}", True),
    (dapo, "\\angle ABC", "\\boxed{\\angle ACB}", False),
    (dapo, "\\angle ABC", "\\boxed{\\angle  ABC}", True),
    (dapo, "\\frac{\\partial f}{\\partial x}", "\\boxed{\\frac{\\partial f}{\\partial y}}", False),
    (dapo, "\\frac{dy}{dx}", "\\boxed{\\frac{dx}{dy}}", False),
    (dapo, "90^\\circ", "\\boxed{90\\text{ rad}}", False),
    (dapo, "12^\\circ", "\\boxed{12^\\circ\\text{C}}", True),
    (dapo, "34", "\\boxed{\\mathbf{34}^{\\circ}}", True),
    (dapo, "34", "\\boxed{34\\text{ degrees}}", True),
    (dapo, "34", "\\boxed{34 \\, \\text{m/s}^2}", True),
    (dapo, "34", "\\boxed{34\\ \\mathrm{cm}^{3}}", True),
    (dapo, "34", "\\boxed{\\approx 34}", True),
    (dapo, "34", "\\boxed{\\dfrac{340}{10}}", True),
    (dapo, "34", "\\boxed{3.4\\times 10^{1}}", True),
    (dapo, "1000000", "\\boxed{1\\,000\\,000}", True),
    (dapo, "1000000", "\\boxed{1{,}000{,}000}", True),
    (dapo, "1000000", "\\boxed{1,000,000}", True),
    (dapo, "0.5", "\\boxed{50\\%}", True),
    (dapo, "-1", "\\boxed{\u20131}", True),
    (dapo, "-1/2", "\\boxed{\u2212\\frac{1}{2}}", True),
    (dapo, "\\frac{1}{2}", "\\boxed{\\frac{1}{2}.}", True),
    (dapo, "\\frac{17}{3}", "\\boxed{5\\frac{2}{3}}", True),
    (dapo, "\\frac{17}{3}", "\\boxed{5\\,\\frac{2}{3}}", True),
    (dapo, "\\frac{17}{3}", "\\boxed{5 2/3}", True),
    (dapo, "52/3", "\\boxed{5 2/3}", False),
    (dapo, "52/3", "\\boxed{5\\frac{2}{3}}", False),
    (dapo, "10/3", "\\boxed{5\\frac{2}{3}}", False),
    (dapo, "10/3", "\\boxed{5 \\cdot \\frac{2}{3}}", True),
    (dapo, "7/2", "\\boxed{3+\\frac12}", True),
    (dapo, "(3,4)", "\\boxed{(4,3)}", False),
    (dapo, "34", "\\boxed{34} \n\n\\boxed{35}", False),
    (dapo, "35", "\\boxed{34}\n\n\\boxed{35}", True),
    (dapo, "34", "\\boxed{34}\\boxed{35}", False),
    (dapo, "3435", "\\boxed{34}\\boxed{35}", False),
    (dapo, "12", "\\boxed{1\\ 2}", False),
    (dapo, "1234", "\\boxed{1 234}", False),
    (dapo, "1", "{1}+{2}", False),
    (dapo, "a}{b", "\\boxed{{a}{b}}", False),
    (dapo, "34", "\\boxed{{34}}", True),
    (dapo, "12", "\\boxed{{1}{2}}", False),
    (dapo, "2", "\\boxed{2\\text{ or }3}", False),
    (dapo, "34", "\\boxed{\\text{34 or 35}}", False),
    (dapo, "34", "**Answer: 34 or 35**", False),
    (dapo, "2/3", "\\boxed{\\frac{2}{3}\\text{ or }0.67}", False),
    (dapo, "0.67", "\\boxed{\\frac23}", False),
    (dapo, "100", "\\boxed{1e2}", True),
    (dapo, "2\\sqrt{2}", "\\boxed{\\sqrt{8}}", True),
    (dapo, "2\\sqrt{2}", "\\boxed{2.828}", False),
    (dapo, "\\frac{\\pi}{2}", "\\boxed{\\pi/2}", True),
    (dapo, "(1,3)", "\\boxed{[1,3]}", False),
    (dapo, "x\\in[1,3]", "\\boxed{[1,3]}", True),
]


@pytest.mark.parametrize(("grade", "reference", "text", "right"), MORE)
def test_further_answers(grade: Callable[[str, str], bool], reference: str, text: str, right: bool) -> None:
    assert grade(reference, text) is right


MANY = 20_000
HOSTILE = {
    "marks": "#### " * MANY,
    "open boxes": "\\boxed{" * MANY,
    "nested boxes": "\\boxed{" * MANY + "}" * MANY,
    "boxes": "\\boxed{1}," * MANY,
    "parentheses": "\\boxed{" + "(" * MANY + ")" * MANY + "}",
    "braces in a short box": "\\boxed{" + "{" * 900 + "}" * 900 + "}",
    "answer lines": "answer:\n" * MANY,
    "answer is": "answer is " * MANY,
    "digits": "#### " + "1" * MANY,
    "words": "#### 1 " + "a " * MANY,
    "blanks after a number": "#### 1" + " " * MANY + "b",
    "tags": "Answer: " + "<b>" * MANY,
    "control spaces": "\\boxed{" + "\\ " * 900 + "x}",
    "a backslash and blanks": "\\boxed{1\\" + " " * 1900 + "x}",
    "units": "#### " + "1 a " * 95,
    "hyphens": "#### 1 " + "ab-" * 120,
    "fractions": "\\boxed{" + "{a \\over" * 200 + "}",
    "text": "\\boxed{" + "\\text{" * 300 + "}" * 300 + "}",
    "blanks": "####" + " " * MANY + "5",
}


@pytest.mark.timeout(120)  # a guard: quadratic time would take minutes
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_wrong_and_costs_little_time(name: str) -> None:
    assert not gsm8k("34", HOSTILE[name]) and not dapo("34", HOSTILE[name])
