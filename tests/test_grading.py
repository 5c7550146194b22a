"""Final answers in the forms that models write: right ones earn the reward, look-alikes do not; hostile text costs little."""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest

from runner.samples import Sample
from runner.tasks import grading
from runner.tasks.dapo_math import DapoMathTask
from runner.tasks.gsm8k import Gsm8kTask
from runner.tasks.numbers import quantity
from runner.tasks.protocol import Prompt
from runner.tasks.rewards import score
from runner.tasks.symbolic import Symbolic, _worth_asking, shared


def gsm8k(reference: str, text: str) -> bool:
    return Gsm8kTask.grade(None, reference, text)  # type: ignore[arg-type]


def dapo(reference: str, text: str) -> bool:
    return DapoMathTask.grade(None, reference, text)  # type: ignore[arg-type]


NUMBERS = [
    ("18", "18"),
    ("18.", "18"),
    ("18.0", "18"),
    ("$18", "18"),
    ("\\$18", "18"),
    ("$18$", "18"),
    ("18$", "18"),
    ("**18**", "18"),
    ("*18*", "18"),
    ("`18`", "18"),
    ("1,234", "1234"),
    ("1{,}234", "1234"),
    ("1\\,234", "1234"),
    ("10\\ 080", "10080"),
    ("1,234,567.5", "1234567.5"),
    ("-18", "-18"),
    ("\u221218", "-18"),
    ("- 18", "-18"),
    ("-$18", "-18"),
    ("$-18", "-18"),
    ("(18)", "18"),
    ("(-18)", "-18"),
    ("+18", "18"),
    ("1/2", "1/2"),
    ("-1/2", "-1/2"),
    ("1 / 2", "1/2"),
    ("1/-2", "-1/2"),
    ("\\frac{1}{2}", "1/2"),
    ("\\dfrac12", "1/2"),
    ("-\\frac{3}{6}", "-1/2"),
    ("\\frac{-1}{2}", "-1/2"),
    ("\\frac{1}{-2}", "-1/2"),
    ("\\tfrac{1}{2}", "1/2"),
    ("\\frac 1 2", "1/2"),
    ("\\frac 12", "1/2"),
    ("\\frac1{2}", "1/2"),
    ("{1 \\over 2}", "1/2"),
    ("5 1/2", "11/2"),
    ("5\\frac{1}{2}", "11/2"),
    ("5 \\frac12", "11/2"),
    ("-5 1/2", "-11/2"),
    ("5-1/2", None),
    ("3\xbd", "7/2"),
    ("\xbd", "1/2"),
    ("51/2", "51/2"),
    ("5 3/2", None),
    ("90^\\circ", "90"),
    ("90^{\\circ}", "90"),
    ("90\xb0", "90"),
    ("90 degrees", "90"),
    ("90\\degree", "90"),
    ("18%", "18"),
    ("18\\%", "18"),
    ("18 percent", "18"),
    ("18 \\%", "18"),
    ("$18\\%$", "18"),
    ("18 apples", "18"),
    ("18 apples.", "18"),
    ("18\\text{ cm}", "18"),
    ("18 \\text{ cm}^2", "18"),
    ("18\\,\\mathrm{cm}^2", "18"),
    ("18\\ \\mathrm{km/h}", "18"),
    ("18 km/h", "18"),
    ("18 m^2", "18"),
    ("18 cm2", "18"),
    ("18 m\xb2", "18"),
    ("18cm", "18"),
    ("$18 per hour", "18"),
    ("$18/hour", "18"),
    ("18 (apples)", "18"),
    ("18 US dollars", "18"),
    ("18 dollars", "18"),
    ("USD 18", "18"),
    ("18 USD", "18"),
    ("\u20ac18", "18"),
    ("18\u20ac", "18"),
    ("\xa318.50", "18.5"),
    ("$1,234.00", "1234"),
    ("2 million", "2000000"),
    ("2.5 million", "2500000"),
    ("3 dozen", "36"),
    ("1.8e1", "18"),
    ("1.8 \\times 10^{1}", "18"),
    ("1.8\\times10^1", "18"),
    ("1.8 \xd7 10^1", "18"),
    ("1.8*10^1", "18"),
    ("10^3", "1000"),
    ("10^{-3}", "1/1000"),
    ("1.8E+3", "1800"),
    (".5", "1/2"),
    ("0.50", "1/2"),
    ("034", "34"),
    ("\\text{18}", "18"),
    ("\\mathrm{18}", "18"),
    ("\\textbf{18}", "18"),
    ("\\mathbf{18}", "18"),
    ("{18}", "18"),
    ("\\left(\\frac{1}{2}\\right)", "1/2"),
    ("\\(34\\)", "34"),
    ("\\[34\\]", "34"),
    ("$$34$$", "34"),
    ("\\displaystyle 34", "34"),
    ("= 18", "18"),
    ("\\approx 18", "18"),
    ('"18"', "18"),
    ("18\\text{ (apples)}", "18"),
    ("18 cubic meters", "18"),
    ("5 1/2 hours", "11/2"),
    ("1/2 cup", "1/2"),
    ("\\frac{1}{2} \\text{ cup}", "1/2"),
    ("\\$18.50", "18.5"),
    ("18 miles per hour", "18"),
    ("18-inch", "18"),
    ("\\boxed{18}", "18"),
    ("\\$1{,}234", "1234"),
    ("\\$1,234 dollars", "1234"),
    ("**18** apples", "18"),
    ("**$18**", "18"),
    ("18\\%.", "18"),
    ("3 4", None),
    ("1, 234", None),
    ("12,34", None),
    ("18 or 20", None),
    ("18 and 3", None),
    ("18-20", None),
    ("1234/0", None),
    ("1233+1", None),
    ("3.4.5", None),
    ("18 apples and 3 pears", None),
    ("x", None),
    ("2x", None),
    ("18k", None),
    ("1,2345", None),
    ("1,234,56", None),
    ("", None),
    ("-", None),
    ("--18", None),
    ("1}+{2", None),
    ("{1}+{2}", None),
    ("2\\pi", None),
    ("2 pi", None),
    ("\\sqrt{2}", None),
    ("2\\sqrt{3}", None),
    ("18 out of 20", None),
    ("3:30", None),
    ("1 234", None),
    ("2^3", None),
    ("3!", None),
    ("1.2,3", None),
    ("\xb2", None),
    ("5\\text{ or }6", None),
    ("18 or", None),
    ("(1)(2)", None),
    ("1)/(2", None),
    ("18 - x", None),
    ("5m", None),
    ("5ab", None),
    ("5 1/2/3", None),
    ("18 not", None),
]

GSM8K_18 = [
    "#### 18 dollars",
    "#### **18**",
    "#### $18",
    "#### 18.",
    "#### 18.00",
    "#### 18 ",
    "####18",
    "##### 18",
    "#### 18 apples and pears",
    "**#### 18**",
    "#### \\(18\\)",
    "#### $18$",
    "#### \\[18\\]",
    "#### $\\boxed{18}$",
    "#### \\boxed{18}.",
    "####\n\n18",
    "####\n\n**18**",
    "#### Final Answer\n18",
    "#### Answer: 18",
    "#### The answer is 18",
    "#### The answer is 18.",
    "#### Final answer: **18**",
    "#### Total: 18 dollars",
    "#### Total = 18",
    "#### 9 + 9 = 18",
    "#### x = 18",
    "#### = 18",
    "#### $9 + 9 = 18$",
    "#### 18\n\nLet me know if you need more help!",
    "#### 18\n\n#### Explanation\nWe added 9 and 9.",
    "#### 18\n#### Check",
    "#### Step 1\n9\n#### Step 2\n9\n#### 18",
    "#### 1. Add the numbers\n9+9\n#### 2. Conclude\n\\boxed{18}",
    "\\boxed{18}",
    "The answer is $\\boxed{18}$.",
    "\\boxed{18 \\text{ dollars}}",
    "\\boxed{\\$18}",
    "\\boxed{18\\text{ cm}}",
    "\\fbox{18}",
    "\\boxed {18}",
    "\\boxed{\\text{18}}",
    "\\boxed{\\mathbf{18}}",
    "\\boxed{x = 18}",
    "#### 18 (eighteen)",
    "#### 18/1",
    "#### 36/2",
    "#### 1.8e1",
    "#### 18%",
    "#### 18 percent",
    "#### 18 km/h",
    "#### 18 m^2",
    "#### 18 cm\xb2",
    "#### 18 square feet",
    "#### 18 hours",
    "#### 18 miles per hour",
    "#### 18, which is the total.",
    "#### 18 \\text{ apples}",
    "#### \\text{18}",
    "#### `18`",
    '#### "18"',
    "#### USD 18",
    "#### 18 USD",
    "#### \u20ac18",
    "#### 18\u20ac",
    "#### \\textbf{18}",
    "#### {18}",
    "#### (18)",
    "#### 18\xb0",
    "#### 18 degrees",
    "#### 5\n#### 18",
    "#### 18 ####",
    "#### 018",
    "#### +18",
    "#### 18\r\n",
    "#### 18\xa0",
    "#### \u200b18",
    "#### $$18$$",
    "####: 18",
    "#### - Answer: 18",
    "#### So the answer is 18",
    "#### Therefore, 18",
    "#### Janet makes $18 every day at the market.",
    "#### She has 18 apples left.",
    "#### In total, 18 apples",
    "#### Janet makes 18 dollars per day.\n\n#### Done",
    "#### 18 - that is the answer",
    "#### 18 \u2014 the total",
    "#### There are 18 apples in total.",
]

GSM8K_RIGHT = [
    ("1234", "#### 1,234"),
    ("1234", "#### $1,234.00"),
    ("1234", "#### 1{,}234"),
    ("1234", "#### 1\\,234"),
    ("1234567", "#### 1,234,567"),
    ("-5", "#### -5"),
    ("-5", "#### \u22125"),
    ("-5", "#### -$5"),
    ("-5", "#### $-5"),
    ("-5", "#### - 5"),
    ("0.5", "#### 1/2"),
    ("0.5", "#### \\frac{1}{2}"),
    ("0.5", "#### .5"),
    ("5.5", "#### 5 1/2"),
    ("5.5", "#### 5\\frac{1}{2}"),
    ("5.5", "#### 5 1/2 hours"),
    ("2000000", "#### 2 million"),
    ("2000000", "#### $2 million"),
    ("24", "#### 2 dozen"),
    ("1,000", "#### 1000"),
    ("1000", "#### 1e3"),
    ("0.25", "#### 25%"),
    ("25", "#### 25%"),
    ("70000", "#### $70,000"),
    ("70000", "#### 70,000 dollars"),
    ("3.5", "#### 3\xbd"),
    ("0", "#### 0"),
    ("0", "#### 0 apples"),
]

GSM8K_WRONG = [
    ("34", "#### 3 4"),
    ("18", "#### 18 or 20"),
    ("18", "#### 18 and 3"),
    ("18", "#### 18-20"),
    ("18", "18"),
    ("18", "#### "),
    ("18", "#### 1 8"),
    ("1234", "#### 1, 234"),
    ("1234", "#### 12,34"),
    ("1234", "#### 1 234"),
    ("18", "#### 18k"),
    ("2", "#### 2 million"),
    ("18", "#### -18"),
    ("18", "#### 18\n#### 5"),
    ("18", "\\boxed{18} #### 5"),
    ("18", "#### 5 \\boxed{5}"),
    ("1", "#### 1. Compute the total"),
    ("1", "#### Step 1"),
    ("18", "#### 1.8"),
    ("18", "#### 180"),
    ("18", "#### 18 + 1"),
    ("18", "#### 17 + 1 apples"),
    ("51", "#### 5 1"),
    ("51/2", "#### 5 1/2"),
    ("18", "#### 18 squared"),
    ("18", "#### not 18"),
    ("18", "#### 18^2"),
    ("18", "#### 2*9"),
    ("5", "#### 5,000"),
    ("18", "#### 18 out of 20"),
    ("18", "#### 18/20"),
    ("3", "#### 3:30"),
    ("18", "#### 18x"),
    ("18", "#### 18!"),
    ("18", "#### 18 times 2"),
    ("18", "#### eighteen"),
    ("5", "#### 5:00"),
    ("18", "#### 1\n8"),
    ("18", "#### 20\n18"),
    ("18", "\\boxed{18} or \\boxed{20}"),
    ("18", "\\boxed{18, 20}"),
    ("18", "#### 18 20"),
    ("18", "#### 18;20"),
    ("1000", "#### 1,000,00"),
    ("1", "#### Step 1: add"),
    ("3", "#### Day 3"),
    ("18", "#### She has 18 apples and 3 pears."),
    ("18", "#### It is not 18."),
    ("18", "#### More than 18 apples"),
    ("18", "#### At least 18"),
    ("2", "#### About 2 million people"),
    ("18", "I think \\boxed{18} but #### 17"),
]

DAPO_34 = [
    "Answer: 34",
    "Answer: 34.",
    "Answer: $34$",
    "Answer: $34$.",
    "Answer: \\(34\\)",
    "Answer: \\[34\\]",
    "Answer: $$34$$",
    "Answer: \\boxed{34}",
    "Answer: $\\boxed{34}$",
    "**Answer:** 34",
    "**Answer**: 34",
    "**Answer: 34**",
    "**Final Answer:** 34",
    "**Final Answer**\n\n\\boxed{34}",
    "### Answer: 34",
    "Answer:\n34",
    "Answer:\n\n$$34$$",
    "Answer:\n\\[\n\\boxed{34}\n\\]",
    "answer: 34",
    "ANSWER: 34",
    "Answer : 34",
    "Answer\uff1a 34",
    "Final Answer: The final answer is $34$. I hope it is correct.",
    "Final Answer: The final answer is 34",
    "The answer is 34.",
    "The final answer is $34$.",
    "So the answer is \\(34\\)",
    "Answer: see below.\n\n\\boxed{34}\n\nThat is the answer.",
    "Answer: 35\nWait, no.\n\\boxed{34}",
    "\\boxed{34}\n\nAnswer: see above.",
    "\\boxed{34}\nThis answers the question: how many?",
    "\\boxed{34}.",
    "\\boxed{ 34 }",
    "\\boxed{\\,34\\,}",
    "\\boxed{34\\;}",
    "\\boxed{34.}",
    "\\boxed{34.0}",
    "\\boxed{034}",
    "\\boxed{+34}",
    "\\boxed{\\text{34}}",
    "\\boxed{\\mathrm{34}}",
    "\\boxed{\\mathbf{34}}",
    "\\boxed{\\textbf{34}}",
    "\\boxed{$34$}",
    "\\boxed{{34}}",
    "\\boxed{34 \\text{ cm}}",
    "\\boxed{34\\text{ cm}^2}",
    "\\boxed{34\\,\\mathrm{cm}}",
    "\\boxed{34\\text{ units}}",
    "\\boxed{34 cm}",
    "\\boxed{34\\%}",
    "\\boxed{34^\\circ}",
    "\\boxed{34^{\\circ}}",
    "\\boxed{34\xb0}",
    "\\boxed{n = 34}",
    "\\boxed{x=34}",
    "\\boxed{N = 34}",
    "\\boxed{m+n = 34}",
    "\\boxed{17 \\cdot 2 = 34}",
    "\\boxed{\\dfrac{34}{1}}",
    "\\boxed{\\frac{68}{2}}",
    "\\boxed{68/2}",
    "\\boxed{\\left(34\\right)}",
    "\\boxed{34}$ and that's it. \\boxed{34}",
    "\\boxed{3}\n then \\boxed{34}",
    "\\boxed{\\boxed{34}}",
    "\\fbox{34}",
    "\\boxed {34}",
    "\\[\\boxed{34}\\]",
    "$$\\boxed{34}$$",
    "\\boxed{\\displaystyle 34}",
    "\\boxed{34\\ \\text{points}}",
    "\\boxed{34~\\text{points}}",
    "\\boxed{\\text{Answer: } 34}",
    "\\boxed{34\\degree}",
    "\\boxed{\\$34}",
    "\\boxed{34\\text{ dollars}}",
    "\\boxed{34 \\quad}",
    "Answer: x = 34",
    "Answer: 34 apples",
    "Final Answer: The largest $n$ is 34.",
    "Answer: There are 34 ways to do it.",
    "The answer to the question is 34.",
    "Answer: **34**",
    "Answer: `34`",
    "The answer is: 34",
    "The answer is:\n34",
    "Answer is: 34",
    "\u7b54\u6848\uff1a34",
    "\\boxed{34\\pmod{100}}",
]

DAPO_RIGHT = [
    ("10080", "\\boxed{10{,}080}"),
    ("10080", "\\boxed{10,080}"),
    ("10080", "\\boxed{10\\,080}"),
    ("10080", "\\boxed{10\\ 080}"),
    ("10080", "\\boxed{10,\\!080}"),
    ("-5", "\\boxed{\u22125}"),
    ("-5", "\\boxed{-5}"),
    ("-5", "\\boxed{- 5}"),
    ("1/2", "\\boxed{\\frac12}"),
    ("1/2", "\\boxed{\\tfrac{1}{2}}"),
    ("1/2", "\\boxed{0.5}"),
    ("1/2", "\\boxed{.5}"),
    ("\\frac{1}{2}", "\\boxed{1/2}"),
    ("-\\frac{1}{2}", "\\boxed{\\frac{-1}{2}}"),
    ("-\\frac{1}{2}", "\\boxed{-\\frac12}"),
    ("7/2", "\\boxed{3 1/2}"),
    ("7/2", "\\boxed{3\\frac{1}{2}}"),
    ("7/2", "\\boxed{3.5}"),
    ("\\sqrt{2}", "\\boxed{\\sqrt2}"),
    ("2\\sqrt{3}", "\\boxed{2 \\sqrt{3}}"),
    ("2\\sqrt{3}", "\\boxed{\\sqrt{12}}"),
    ("\\frac{\\sqrt{2}}{2}", "\\boxed{\\frac{1}{\\sqrt{2}}}"),
    ("\\pi", "\\boxed{\\pi}"),
    ("2\\pi", "\\boxed{2 \\pi}"),
    ("(1,2)", "\\boxed{(1, 2)}"),
    ("(1,2)", "\\boxed{\\left(1,2\\right)}"),
    ("[0,1)", "\\boxed{[0, 1)}"),
    ("1,2,3", "\\boxed{1, 2, 3}"),
    ("1,2,3", "\\boxed{3,2,1}"),
    ("\\{1,2\\}", "\\boxed{\\{1, 2\\}}"),
    ("(B)", "\\boxed{B}"),
    ("B", "\\boxed{\\text{(B)}}"),
    ("B", "\\boxed{\\textbf{(B)}}"),
    ("Yes", "\\boxed{\\text{yes}}"),
    ("x+1", "\\boxed{1+x}"),
    ("x^2-1", "\\boxed{(x-1)(x+1)}"),
    ("\\frac{1}{x}", "\\boxed{x^{-1}}"),
    ("1024", "\\boxed{2^{10}}"),
    ("120", "\\boxed{5!}"),
    ("6", "\\boxed{2\\cdot 3}"),
    ("1000000", "\\boxed{10^6}"),
    ("1000000", "\\boxed{1 \\times 10^6}"),
    ("5 \\text{ cm}", "\\boxed{5}"),
    ("5", "\\boxed{5\\text{ cm}}"),
    ("5 \\text{ cm}", "\\boxed{5 cm}"),
    ("1.5", "\\boxed{\\frac{3}{2}}"),
    ("25\\%", "\\boxed{0.25}"),
    ("25\\%", "\\boxed{25\\%}"),
    ("25\\%", "\\boxed{25}"),
    ("x=5", "\\boxed{5}"),
    ("5", "\\boxed{x = 5}"),
    ("\\infty", "\\boxed{\\infty}"),
    ("3,5", "\\boxed{3} and \\boxed{5}"),
    ("3,5", "\\boxed{3}, \\boxed{5}"),
    ("1/3", "\\boxed{\\frac{2}{6}}"),
    ("90", "\\boxed{90^\\circ}"),
    ("90^\\circ", "\\boxed{90}"),
    ("90^\\circ", "\\boxed{90^{\\circ}}"),
    ("90^\\circ", "\\boxed{90\xb0}"),
    ("1,000", "\\boxed{1000}"),
    ("\\text{yes}", "\\boxed{\\text{Yes}}"),
    ("(-\\infty, 3]", "\\boxed{(-\\infty,3]}"),
    ("\\frac{3}{4}", "Answer: \\frac{3}{4}"),
    ("\\frac{3}{4}", "Answer: $\\frac{3}{4}$."),
    ("2+3i", "\\boxed{3i+2}"),
    ("e^2", "\\boxed{e^{2}}"),
    ("\\log 2", "\\boxed{\\log(2)}"),
    ("a+b", "\\boxed{b + a}"),
]

DAPO_WRONG = [
    ("34", "34"),
    ("34", "\\boxed{}"),
    ("34", "\\boxed{34"),
    ("34", "Answer:"),
    ("34", "Answer: 34\nAnswer: 35"),
    ("34", "\\boxed{34} Answer: 35"),
    ("34", "\\boxed{3 4}"),
    ("7", "\\boxed{3 4}"),
    ("12", "\\boxed{3 4}"),
    ("31/2", "\\boxed{3 1/2}"),
    ("1234", "\\boxed{1, 234}"),
    ("235", "\\boxed{1, 234}"),
    ("1}+{2", "\\boxed{{1}+{2}}"),
    ("34", "\\boxed{34} or \\boxed{35}"),
    ("35", "\\boxed{34} or \\boxed{35}"),
    ("34", "\\boxed{34, 35}"),
    ("34", "\\boxed{34 \\text{ or } 35}"),
    ("35", "\\boxed{34 \\text{ or } 35}"),
    ("34", "\\boxed{-34}"),
    ("-34", "\\boxed{34}"),
    ("34", "\\boxed{\\pm 34}"),
    ("34", "\\boxed{34x}"),
    ("34", "\\boxed{34!}"),
    ("34", "\\boxed{3.4}"),
    ("34", "\\boxed{340}"),
    ("34", "\\boxed{34^2}"),
    ("1/3", "\\boxed{0.33}"),
    ("1/3", "\\boxed{0.3333}"),
    ("0.33", "\\boxed{1/3}"),
    ("3.14", "\\boxed{\\pi}"),
    ("\\pi", "\\boxed{3.14}"),
    ("\\pi", "\\boxed{3.14159}"),
    ("(1,2)", "\\boxed{(2,1)}"),
    ("(1,2)", "\\boxed{[1,2]}"),
    ("[0,1)", "\\boxed{(0,1]}"),
    ("1,2,3", "\\boxed{1,2}"),
    ("1,2", "\\boxed{12}"),
    ("12", "\\boxed{1,2}"),
    ("B", "\\boxed{A}"),
    ("(B)", "\\boxed{C}"),
    ("Yes", "\\boxed{No}"),
    ("x", "\\boxed{y}"),
    ("x+1", "\\boxed{x-1}"),
    ("x^2", "\\boxed{2x}"),
    ("\\sqrt{2}", "\\boxed{1.41}"),
    ("\\sqrt{2}", "\\boxed{2}"),
    ("\\sqrt2", "\\boxed{-\\sqrt2}"),
    ("5 \\text{ cm}", "\\boxed{5 \\text{ m}}"),
    ("5\\text{ cm}", "\\boxed{6\\text{ cm}}"),
    ("0.5", "\\boxed{5}"),
    ("25\\%", "\\boxed{0.5}"),
    ("100", "\\boxed{10^{10}}"),
    ("34", "Answer: not 34"),
    ("34", "The answer is not 34"),
    ("34", "Answer: 34 or 35"),
    ("34", "Answer: between 33 and 35"),
    ("34", "Answer: 33 + 2"),
    ("34", "\\boxed{x > 34}"),
    ("34", "\\boxed{\\ge 34}"),
    ("34", "\\boxed{x \\leq 34}"),
    ("34", "\\boxed{\\approx 35}"),
    ("34", "\\boxed{\\text{thirty-four}}"),
    ("5050", "\\boxed{\\sum_{k=1}^{100} k}"),
    ("1", "\\boxed{0.999999}"),
    ("1", "\\boxed{1.0000001}"),
    ("2", "\\boxed{2^{9^{9^9}}}"),
    ("2", "\\boxed{9^9^9^9}"),
    ("2", "\\boxed{100000!}"),
    ("34", "\\boxed{?}"),
    ("34", "\\boxed{34?}"),
    ("16", "\\boxed{4 4}"),
    ("0", "\\boxed{x}"),
    ("34", "\\boxed{\\text{none}}"),
    ("3", "\\boxed{1,2,3}"),
    ("3", "\\boxed{\\{3,4\\}}"),
    ("1234", "\\boxed{12,34}"),
    ("9", "\\boxed{3\\frac{3}{1}}"),
    ("6", "\\boxed{3 \\frac{6}{3}}"),
    ("5", "\\boxed{y=6}"),
    ("no", "\\boxed{on}"),
    ("dog", "\\boxed{god}"),
    ("50", "\\boxed{50\\% \\text{ of } 60}"),
    ("2", "\\boxed{x_2}"),
    ("2", "\\boxed{(2}"),
    ("34", "\\boxed{34} is wrong, \\boxed{33}"),
]


MORE = [
    (gsm8k, "18", "9+9=18\n#### 18\n\n**Note:** 9 per day", True),
    (gsm8k, "18", "The answer is 18\n#### 18 eggs/day", True),
    (gsm8k, "3", "#### 3 bolts", True),
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
    (dapo, "34", "First answer: 12 is wrong.\n\\boxed{34}", True),
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


@pytest.mark.parametrize(("text", "value"), NUMBERS)
def test_numbers_are_read_as_people_write_them(text: str, value: str | None) -> None:
    found = quantity(text)
    assert (None if found is None else found.value) == (None if value is None else Fraction(value))


@pytest.mark.parametrize("text", GSM8K_18)
def test_gsm8k_takes_18_in_every_form(text: str) -> None:
    assert gsm8k("18", "9 + 9 = 18\n" + text)
    assert not gsm8k("19", "9 + 9 = 18\n" + text) and not gsm8k("1", "9 + 9 = 18\n" + text)


@pytest.mark.parametrize(("reference", "text"), GSM8K_RIGHT)
def test_gsm8k_takes_right_answers(reference: str, text: str) -> None:
    assert gsm8k(reference, text)


@pytest.mark.parametrize(("reference", "text"), GSM8K_WRONG)
def test_gsm8k_refuses_wrong_answers(reference: str, text: str) -> None:
    assert not gsm8k(reference, text)


@pytest.mark.parametrize("text", DAPO_34)
def test_dapo_takes_34_in_every_form(text: str) -> None:
    assert dapo("34", "So 17*2.\n" + text)
    assert not dapo("35", "So 17*2.\n" + text) and not dapo("3", "So 17*2.\n" + text)


@pytest.mark.parametrize(("reference", "text"), DAPO_RIGHT)
def test_dapo_takes_right_answers(reference: str, text: str) -> None:
    assert dapo(reference, text)


@pytest.mark.parametrize(("reference", "text"), DAPO_WRONG)
def test_dapo_refuses_wrong_answers(reference: str, text: str) -> None:
    assert not dapo(reference, text)


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
    "units": "#### " + "1 a " * 95,
    "hyphens": "#### 1 " + "ab-" * 120,
    "fractions": "\\boxed{" + "{a \\over" * 200 + "}",
    "text": "\\boxed{" + "\\text{" * 300 + "}" * 300 + "}",
    "blanks": "####" + " " * MANY + "5",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_wrong_and_costs_little_time(name: str) -> None:
    started = time.process_time()
    assert not gsm8k("34", HOSTILE[name]) and not dapo("34", HOSTILE[name])
    assert time.process_time() - started < 20  # quadratic time would take minutes


# ---- math-verify in a process of its own


@pytest.fixture(scope="module")
def symbolic() -> Symbolic:
    return Symbolic()


@pytest.mark.parametrize(
    ("given", "reference", "equal"),
    [
        ("\\sqrt{12}", "2\\sqrt{3}", True),
        ("(x-1)(x+1)", "x^2-1", True),
        ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}{2}", True),
        ("x+2", "x+1", False),
        ("\\frac{1}{0}", "2", False),
        ("", "2", False),
        ("\\frac{", "2", False),
        ("]\n[", "2", False),
        ("\ud800", "2", False),
    ],
)
def test_formulas_are_compared_as_mathematics(symbolic: Symbolic, given: str, reference: str, equal: bool) -> None:
    assert symbolic.equal(given, reference) is equal


@pytest.mark.parametrize(
    "given", ["9^{9^9}", "9^9^9", "2^{100000}", "100000!", "3!!", "\\sum_{k=1}^{100} k", "\\int_0^1 x dx", "1" * 500]
)
def test_towers_and_work_left_undone_are_not_even_asked(given: str) -> None:
    assert not _worth_asking(given, "2")
    assert given.startswith(("1", "2", "3", "9")) or _worth_asking(given, given)


def test_a_comparison_that_never_ends_counts_as_wrong_and_the_next_one_works(symbolic: Symbolic) -> None:
    symbolic.start()
    assert symbolic._ask("9^{9^9}", "2") is False
    assert symbolic._ask("\\frac{2}{4}", "0.5") is True
    process = symbolic._process
    assert process is not None
    process.kill()  # as the kernel does when it takes too much memory
    process.wait()
    assert symbolic._ask("\\frac{2}{4}", "0.5") is True
    symbolic.close()
    assert symbolic._process is None


def test_model_text_is_never_run(symbolic: Symbolic, tmp_path: Path) -> None:
    target = tmp_path / "made"
    for text in (f"__import__('pathlib').Path('{target}').touch()", f"\\text{{open('{target}', 'w')}}", "exit()", "lambda: 0"):
        assert symbolic._ask(text, "2") is False
        assert symbolic._ask("1+1", "2") is True
    assert not target.exists()


def test_rewards_compare_formulas_from_their_own_thread() -> None:
    class Task:
        name = "maths"

        def reward(self, prompt: Prompt, text: str, sample: Sample | None) -> float:
            return float(grading.same_answer(text, prompt.answer))

    prompts = [Prompt(str(i), "", (), "2\\sqrt{3}") for i in range(4)]
    texts = ["\\sqrt{12}", "\\sqrt{13}", "2 \\cdot \\sqrt 3", "9^{9^9}"]
    shared.start()
    report = score(Task(), [(p, t, None) for p, t in zip(prompts, texts, strict=True)], timeout_seconds=100.0)  # type: ignore[arg-type]
    assert report.rewards == [1.0, 0.0, 1.0, 0.0] and not report.failures


def test_a_thread_that_is_told_to_give_up_leaves_no_answer_behind_for_the_next_question(symbolic: Symbolic) -> None:
    class Task:
        name = "slow"

        def reward(self, prompt: Prompt, text: str, sample: Sample | None) -> float:
            return float(symbolic.equal(text, "0.5"))

    assert symbolic._ask("1", "2") is False  # started
    prompts = [Prompt(str(i), "", (), "") for i in range(2)]
    items = [(prompts[0], "(1+x)^{900}(1-x)^{900}", None), (prompts[1], "\\frac{1}{2}", None)]
    report = score(Task(), items[:1], timeout_seconds=0.2)  # type: ignore[arg-type]
    assert report.rewards == [None] and len(report.failures) == 1
    assert score(Task(), items[1:], timeout_seconds=100.0).rewards == [1.0]  # type: ignore[arg-type]
    symbolic.close()
