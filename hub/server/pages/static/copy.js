// Copy buttons, and nothing else: without JavaScript they stay hidden.
for (const button of document.querySelectorAll("button.copy")) {
  if (!navigator.clipboard) break;
  button.hidden = false;
  const say = document.createElement("span");
  say.className = "unseen";
  say.setAttribute("role", "status");
  button.after(say);
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.parentElement.querySelector("code").textContent);
    button.textContent = "Copied";
    say.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; say.textContent = ""; }, 2000);
  });
}
