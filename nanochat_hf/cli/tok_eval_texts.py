"""Short texts of several kinds, written for tok_eval: a tokenizer is judged on what it did not see in training too."""

# ruff: noqa: E501, RUF001 - the texts are data: their letters and their line breaks are what is measured

TEXTS = {
    "news": """The city council voted on Tuesday to extend the tram line to the northern harbour, ending almost nine years of argument about
who should pay for it. Construction is to begin in April and to cost 214 million euros, of which the state has promised a little less than half.
"We have heard every objection twice," said the mayor, Helen Okafor, after the session. "Now people want to see rails." Shopkeepers along the
route fear two summers of noise; a spokeswoman for the transport authority said that no street would be closed for more than six weeks at a time.
Meteorologists, meanwhile, warned of heavy rain in the region until Friday, with rivers expected to rise above the levels of last November.
""",
    "code": '''import heapq
from collections import defaultdict


def shortest_paths(edges: list[tuple[str, str, float]], source: str) -> dict[str, float]:
    """Dijkstra's algorithm; distances from `source` to every node that can be reached."""
    graph = defaultdict(list)
    for start, end, weight in edges:
        if weight < 0:
            raise ValueError(f"edge {start} -> {end} has a negative weight: {weight}")
        graph[start].append((end, weight))
    distances, queue = {}, [(0.0, source)]
    while queue:
        distance, node = heapq.heappop(queue)
        if node in distances:
            continue
        distances[node] = distance
        for neighbour, weight in graph[node]:
            if neighbour not in distances:
                heapq.heappush(queue, (distance + weight, neighbour))
    return distances


for (int i = 0; i < n_rows; ++i) {
    const float *row = data + i * stride;
    float total = 0.0f;
    for (int j = 0; j < n_cols; j++) total += row[j] * weights[j];
    out[i] = total > threshold ? 1 : 0;
}
''',
    "mathematics": r"""Let $f : [a, b] \to \mathbb{R}$ be continuous. Then $F(x) = \int_a^x f(t)\,dt$ is differentiable on $(a, b)$ and $F'(x) = f(x)$.
\begin{proof} For $h \neq 0$ we have $\frac{F(x+h) - F(x)}{h} = \frac{1}{h}\int_x^{x+h} f(t)\,dt$. By the mean value theorem there is a
$\xi_h$ between $x$ and $x + h$ with $\int_x^{x+h} f(t)\,dt = h f(\xi_h)$, and $\xi_h \to x$ as $h \to 0$. \end{proof}
\[ \sum_{k=1}^{n} k^2 = \frac{n(n+1)(2n+1)}{6}, \qquad e^{i\pi} + 1 = 0, \qquad \lim_{n\to\infty} \left(1 + \frac{1}{n}\right)^n = e \approx 2.71828 \]
3x + 7 = 25, so 3x = 18 and x = 6. 1234 * 5678 = 7006652; 0.125 = 1/8; 99 - 47 + 13 = 65; 2^16 = 65536.
""",
    "German": """Am Morgen lag noch Nebel über dem Fluss, als die ersten Fischer ihre Boote losmachten. Niemand sprach viel; man kannte sich seit der
Kindheit und wusste, was der andere dachte. Erst gegen Mittag, als die Wärme durch die Wolken kam, begannen die Gespräche über das Wetter, die
Preise und die neue Brücke, deren Fertigstellung sich nun schon zum dritten Mal verzögerte. Größere Überraschungen erwartete hier keiner mehr.
""",
    "French": """Le matin, la brume couvrait encore la rivière lorsque les premiers pêcheurs détachèrent leurs barques. On parlait peu ; chacun
connaissait les autres depuis l'enfance et savait ce qu'ils pensaient. Vers midi seulement, quand la chaleur traversa les nuages, on se mit à
discuter du temps, des prix et du nouveau pont, dont l'achèvement était déjà repoussé pour la troisième fois.
""",
    "Russian": """Утром над рекой ещё стоял туман, когда первые рыбаки отвязали свои лодки. Говорили мало: все знали друг друга с детства. Только к
полудню, когда сквозь облака пробилось тепло, начались разговоры о погоде, о ценах и о новом мосте, открытие которого снова отложили.
""",
    "Chinese": """清晨，河面上还笼罩着薄雾，第一批渔民已经解开了小船。大家很少说话，因为彼此从小就认识，知道对方在想什么。直到中午，阳光穿过云层，
人们才开始谈论天气、物价，还有那座第三次推迟完工的新桥。没有人再期待什么大的惊喜，但每个人都愿意等待。
""",
    "Arabic": """في الصباح كان الضباب لا يزال يغطي النهر عندما فك الصيادون الأوائل قواربهم. لم يتكلموا كثيرا، فكل واحد منهم يعرف الآخر منذ الطفولة.
وعند الظهر فقط، حين اخترق الدفء الغيوم، بدأت الأحاديث عن الطقس والأسعار والجسر الجديد الذي تأجل افتتاحه للمرة الثالثة.
""",
    "Hindi": """सुबह नदी पर अभी भी कोहरा छाया हुआ था जब पहले मछुआरों ने अपनी नावें खोलीं। लोग कम बोलते थे, क्योंकि सब एक दूसरे को बचपन से जानते थे।
दोपहर को जब बादलों से धूप निकली, तब मौसम, दामों और नए पुल की बातें शुरू हुईं, जिसका काम तीसरी बार टल गया था।
""",
}
